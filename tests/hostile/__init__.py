"""Broken checkpoints, made from a good one, and what every reader says of them."""
