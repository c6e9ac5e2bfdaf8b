"""Calibration text that the 16-bit model writes itself."""

from typing import Any

import torch
from torch import Tensor

from tacq_vllm.config import CalibrationConfig
from tacq_vllm.quantize.errors import QuantizeError
from tacq_vllm.quantize.model import BaseModel
from tacq_vllm.quantize.progress import Progress
from tacq_vllm.quantize.samples import render_chat

PHASE = "self-generation"

_CONTENT_MARK = "\N{OBJECT REPLACEMENT CHARACTER}"
_BATCH = 32


def generate_windows(
    base: BaseModel, config: CalibrationConfig, count: int, progress: Progress
) -> list[Tensor]:
    """Windows of text that the model writes itself, each int64 [seq_len].

    A chat model opens with the header of a user's turn, so that it writes both a
    question and its answer; another one opens with its first token alone. The end of
    a turn does not end the window. The whole model is in memory meanwhile.

    Raises:
        QuantizeError: a window has no room after the chat template, or the tokenizer
            has no token to begin with.
    """
    prompt = _prompt(base.tokenizer).to(base.device)
    length = config.seq_len - prompt.numel()
    if length < 1:
        raise QuantizeError(
            f"seq_len {config.seq_len} leaves no room after the chat template's "
            f"{prompt.numel()} tokens"
        )
    windows: list[Tensor] = []
    with (
        base.resident() as model,
        torch.no_grad(),
        torch.random.fork_rng(),
        progress.phase(PHASE, count) as bar,
    ):
        torch.manual_seed(config.seed)
        while len(windows) < count:
            batch = min(_BATCH, count - len(windows))
            tokens = model.generate(
                prompt.expand(batch, -1),
                attention_mask=torch.ones_like(prompt).expand(batch, -1),
                do_sample=True,
                temperature=config.temperature,
                top_k=0,
                top_p=1.0,
                max_new_tokens=length,
                min_new_tokens=length,
                eos_token_id=None,
                pad_token_id=0,
            )
            windows += list(tokens.cpu())
            bar.advance(batch)
    return windows


def _prompt(tokenizer: Any) -> Tensor:
    if getattr(tokenizer, "chat_template", None):
        chat = [{"role": "user", "content": _CONTENT_MARK}]
        text = render_chat(tokenizer, chat, "self-generation")
        opening = text.split(_CONTENT_MARK)[0]
        ids = tokenizer(opening, add_special_tokens=False).input_ids
    else:
        known = (tokenizer.bos_token_id, tokenizer.eos_token_id)
        ids = [token for token in known if token is not None][:1]
        if not ids:
            raise QuantizeError(
                "the tokenizer has no first token to generate from: give a file as "
                "the calibration source"
            )
    return torch.tensor([ids], dtype=torch.int64)
