"""Quantize LLMs with TaCQ, store them really packed, and serve them with vLLM."""

__version__ = "0.1.0"
