"""Calibration sources to fixed-length token windows, seeded."""

import gzip
import json
import random
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tacq_vllm.config import CalibrationConfig
from tacq_vllm.quantize.errors import QuantizeError
from tacq_vllm.quantize.model import BaseModel
from tacq_vllm.quantize.progress import Progress

SELF = "self"
_CONTENT_MARK = "\N{OBJECT REPLACEMENT CHARACTER}"
_GENERATION_BATCH = 32


def calibration_windows(
    base: BaseModel, config: CalibrationConfig, progress: Progress
) -> list[Tensor]:
    """Token windows of all sources, each int64 [seq_len], in a seeded order.

    The sources share `num_samples` evenly.

    Raises:
        QuantizeError: a file is missing, malformed, or shorter than one window.
    """
    shares = [
        len(range(index, config.num_samples, len(config.sources)))
        for index in range(len(config.sources))
    ]
    windows: list[Tensor] = []
    for source, count in zip(config.sources, shares, strict=True):
        if source == SELF:
            windows += generate_windows(base, config, count, progress)
        else:
            windows += file_windows(base.tokenizer, Path(source), config, count)
    random.Random(config.seed).shuffle(windows)
    return windows


def generate_windows(
    base: BaseModel, config: CalibrationConfig, count: int, progress: Progress
) -> list[Tensor]:
    """Windows of text that the model writes itself.

    A chat model opens with the header of a user's turn, so that it writes both a
    question and its answer; another one opens with its first token alone. The end of
    a turn does not end the window.
    """
    prompt = _self_prompt(base.tokenizer).to(base.model.device)
    length = config.seq_len - prompt.numel()
    if length < 1:
        raise QuantizeError(
            f"seq_len {config.seq_len} leaves no room after the chat template's "
            f"{prompt.numel()} tokens"
        )
    windows: list[Tensor] = []
    with torch.random.fork_rng(), progress.phase("self-generation", count) as bar:
        torch.manual_seed(config.seed)
        while len(windows) < count:
            batch = min(_GENERATION_BATCH, count - len(windows))
            tokens = base.model.generate(
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


def file_windows(
    tokenizer: Any, path: Path, config: CalibrationConfig, count: int
) -> list[Tensor]:
    """Windows at random places of a file's samples, tokenized and joined.

    Args:
        tokenizer: the model's.
        path: `.txt` (one long text) or `.jsonl` (`text`, `prompt` and `completion`,
            or chat `messages` per line), also with `.gz`.
        config: gives the window's length and the seed.
        count: number of windows.
    """
    if not path.is_file():
        raise QuantizeError(
            f"calibration source {str(path)!r}: no such file (and not `{SELF}`)"
        )
    tokens = read_tokens(tokenizer, path)
    last = tokens.numel() - config.seq_len
    if last < 0:
        raise QuantizeError(
            f"{path}: {tokens.numel()} tokens, fewer than one window of "
            f"{config.seq_len}"
        )
    generator = torch.Generator().manual_seed(config.seed)
    starts = torch.randint(max(last, 1), (count,), generator=generator).tolist()
    return [tokens[start : start + config.seq_len] for start in starts]


def read_tokens(tokenizer: Any, path: Path) -> Tensor:
    """All samples of a `.txt` or `.jsonl` file, tokenized and joined: int64 [n]."""
    tokens: list[int] = []
    for sample in _read_samples(tokenizer, path):
        tokens += sample
    return torch.tensor(tokens, dtype=torch.int64)


def _self_prompt(tokenizer: Any) -> Tensor:
    if getattr(tokenizer, "chat_template", None):
        chat = [{"role": "user", "content": _CONTENT_MARK}]
        opening = _render_chat(tokenizer, chat, SELF).split(_CONTENT_MARK)[0]
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


def _read_samples(tokenizer: Any, path: Path) -> Iterator[list[int]]:
    opener = gzip.open if path.suffix == ".gz" else open
    kind = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    if kind not in (".txt", ".jsonl"):
        raise QuantizeError(f"{path}: a .txt or .jsonl file (.gz) is expected")
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            if kind == ".txt":
                yield tokenizer(file.read()).input_ids
                return
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield _sample_tokens(tokenizer, line, f"{path}, line {number}")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise QuantizeError(f"{path}: cannot be read: {error}") from error


def _sample_tokens(tokenizer: Any, line: str, where: str) -> list[int]:
    try:
        sample = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise QuantizeError(f"{where}: not JSON: {error}") from error
    match sample:
        case {"text": str(text)}:
            pass
        case {"prompt": str(prompt), "completion": str(completion)}:
            text = prompt + completion
        case {"messages": list(messages)}:
            # The template writes the special tokens itself.
            text = _render_chat(tokenizer, messages, where)
            return list(tokenizer(text, add_special_tokens=False).input_ids)
        case _:
            raise QuantizeError(
                f"{where}: none of `text`, `prompt` with `completion`, or `messages`"
            )
    return list(tokenizer(text).input_ids)


def _render_chat(tokenizer: Any, messages: list[Any], where: str) -> str:
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception as error:  # A template is a program: it may fail in any way.
        reason = " ".join(str(error).split())
        raise QuantizeError(f"{where}: the chat template fails: {reason}") from error
