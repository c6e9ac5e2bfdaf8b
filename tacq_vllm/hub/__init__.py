"""Checkpoints that people share: model cards, push and pull."""

from tacq_vllm.hub.card import rewrite_model_card, write_model_card

__all__ = ["rewrite_model_card", "write_model_card"]
