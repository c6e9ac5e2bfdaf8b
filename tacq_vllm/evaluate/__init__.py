"""Scores of a model, in 16 bits or packed, on Transformers or vLLM."""
