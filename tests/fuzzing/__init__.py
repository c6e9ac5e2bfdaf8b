"""Feeding the readers what nobody would write."""
