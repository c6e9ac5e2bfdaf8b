"""The plugins for Transformers and vLLM."""
