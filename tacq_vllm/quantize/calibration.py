"""Calibration sources to a budget of token samples, seeded.

Running text is cut into windows of one length. Samples of a task (a prompt with its
completion, a chat) stay whole, each in its own length, and are never padded (TaCQ
paper, appendix D and E).
"""

import random
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from tacq_vllm.config import CalibrationConfig
from tacq_vllm.data.errors import DataError
from tacq_vllm.quantize.errors import QuantizeError
from tacq_vllm.quantize.generation import generate_windows
from tacq_vllm.quantize.model import BaseModel
from tacq_vllm.quantize.progress import Progress
from tacq_vllm.quantize.samples import Sample, SampleReader, join_tokens
from tacq_vllm.quantize.workdir import PhaseFolder

SELF = "self"
PHASE = "calibration"


def calibration_samples(
    base: BaseModel,
    config: CalibrationConfig,
    data_root: Path | None,
    folder: PhaseFolder,
    progress: Progress,
) -> list[Sample]:
    """Samples of all sources in a seeded order, kept in `folder` for the next run.

    The sources share the budget of `num_samples` times `seq_len` tokens evenly. One
    that is shorter is used once, which `progress` is told.

    Raises:
        QuantizeError: a source is unknown, cannot be read, malformed or empty.
    """
    if PHASE in folder:
        progress.note(f"{PHASE}: taken from the work folder")
    else:
        try:
            samples = list(_all_sources(base, config, data_root, progress))
        except DataError as error:
            raise QuantizeError(str(error)) from error
        random.Random(config.seed).shuffle(samples)
        _save(samples, folder)
    return _load(folder)


def _all_sources(
    base: BaseModel,
    config: CalibrationConfig,
    data_root: Path | None,
    progress: Progress,
) -> Iterator[Sample]:
    reader = SampleReader(base.tokenizer, config.loss == "completion", data_root)
    limit = getattr(base.model.config, "max_position_embeddings", None)
    for index, source in enumerate(config.sources):
        count = len(range(index, config.num_samples, len(config.sources)))
        if source == SELF:
            yield from map(Sample.of, generate_windows(base, config, count, progress))
            continue
        found = reader.read(source)
        name = Path(source).name
        budget = count * config.seq_len
        if found.is_text:
            tokens = join_tokens(found.samples)
            chosen = cut_windows(tokens, config.seq_len, count, config.seed)
        else:
            chosen = take_whole(found.samples, budget, limit, config.seed)
        used = sum(sample.tokens.numel() for sample in chosen)
        if count and used < 2:
            raise QuantizeError(f"calibration source {name!r}: no text to use")
        whole = sum(sample.tokens.numel() for sample in found.samples)
        if whole < budget:
            progress.note(
                f"{name}: {whole} tokens, fewer than the {budget} asked for; used once"
            )
        yield from chosen


def cut_windows(tokens: Tensor, seq_len: int, count: int, seed: int) -> list[Sample]:
    """Windows of a text at random places; the whole text, once, if it is short.

    Args:
        tokens: int64 [n].
        seq_len: tokens of a window.
        count: number of windows.
        seed: of their places.
    """
    if tokens.numel() < count * seq_len:
        parts = tokens.split(seq_len)
        return [Sample.of(part) for part in parts if part.numel() > 1]
    generator = torch.Generator().manual_seed(seed)
    last = max(tokens.numel() - seq_len, 1)
    starts = torch.randint(last, (count,), generator=generator).tolist()
    return [Sample.of(tokens[start : start + seq_len]) for start in starts]


def take_whole(
    samples: list[Sample], budget: int, limit: int | None, seed: int
) -> list[Sample]:
    """Whole samples in random order until the next would exceed the budget.

    Args:
        samples: to choose from.
        budget: tokens in all; one sample is taken in any case.
        limit: longest sample that the model can take, or None.
        seed: of their order.
    """
    usable = [s for s in samples if 1 < s.tokens.numel() <= (limit or budget)]
    random.Random(seed).shuffle(usable)
    chosen: list[Sample] = []
    total = 0
    for sample in usable:
        total += sample.tokens.numel()
        if chosen and total > budget:
            break
        chosen.append(sample)
    return chosen


def _save(samples: list[Sample], folder: PhaseFolder) -> None:
    lengths = [sample.tokens.numel() for sample in samples]
    tensors = {
        "tokens": join_tokens(samples),
        "scored": torch.cat([sample.scored for sample in samples]),
        "lengths": torch.tensor(lengths),
    }
    folder.save(PHASE, tensors)


def _load(folder: PhaseFolder) -> list[Sample]:
    tensors = {name: t.clone() for name, t in folder.load(PHASE).items()}
    lengths = tensors["lengths"].tolist()
    parts = (tensors[name].split(lengths) for name in ("tokens", "scored"))
    return [Sample(*pair) for pair in zip(*parts, strict=True)]
