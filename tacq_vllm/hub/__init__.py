"""Checkpoints that people share: model cards, push and pull."""

from tacq_vllm.hub.card import write_model_card

__all__ = ["write_model_card"]
