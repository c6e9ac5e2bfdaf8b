"""Perplexity by a script of its own; nothing of the project but the loader."""

import math
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import tacq_vllm.integrations.transformers  # noqa: F401


def plain_perplexity(folder: Path, text: str, window: int, count: int) -> float:
    """Of the first windows of a text, their first tokens not predicted."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt").input_ids[0]
    losses = []
    for tokens in ids[: count * window].view(count, window):
        with torch.no_grad():
            loss = model(tokens[None], labels=tokens[None]).loss
        losses.append(float(loss))
    return math.exp(sum(losses) / count)
