"""Calibration sources to a budget of token samples, seeded.

Running text is cut into windows of one length. Samples of a task (a prompt with its
completion, a chat) stay whole, each in its own length, and are never padded (TaCQ
paper, appendix D and E).
"""

import json
import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tacq_vllm.config import CalibrationConfig
from tacq_vllm.data.errors import DataError
from tacq_vllm.data.sets import NAMED_SETS
from tacq_vllm.quantize.depends import Depends, digest
from tacq_vllm.quantize.errors import QuantizeError
from tacq_vllm.quantize.generation import generate_windows
from tacq_vllm.quantize.model import BaseModel
from tacq_vllm.quantize.progress import Progress
from tacq_vllm.quantize.samples import Sample, SampleReader, join_tokens
from tacq_vllm.quantize.workdir import PhaseFolder, WorkDir, file_stamp
from tacq_vllm.quantize.world import World

SELF = "self"
PHASE = "calibration"

_TEXT_MARGIN = 8
"""Windows are cut from this many times the tokens that they hold."""


def calibrate(
    base: BaseModel,
    config: CalibrationConfig,
    common: Depends,
    data_root: Path | None,
    workdir: WorkDir,
    progress: Progress,
    world: World,
) -> list[Sample]:
    """The samples of a run, the same in all its processes, from the work folder.

    Args:
        base: the model whose tokenizer reads, and which writes `self`.
        config: sources and budget.
        common: what every phase of the run depends on.
        data_root: folder of the named sets; None: the Hub.
        workdir: keeps the samples for the next run.
        progress: notes what is short or left out.
        world: the processes that share the samples.

    Raises:
        QuantizeError: as `calibration_samples`, or more processes than samples.
    """
    files = [Path(source) for source in config.sources if Path(source).is_file()]
    depends = {
        **common,
        "calibration": config.model_dump(mode="json"),
        "tokenizer": _tokenizer_digest(base.tokenizer),
        "chat_template": getattr(base.tokenizer, "chat_template", None),
        "files": [digest([path.read_bytes()]) for path in files],
        "data_root": _named_files(config.sources, data_root),
    }
    with world.leader_first():
        folder = workdir.phase(PHASE, depends)
        samples = calibration_samples(base, config, data_root, folder, progress)
    if len(samples) < world.size:
        raise QuantizeError(
            f"{world.size} processes share {len(samples)} calibration samples: start "
            "fewer, or give more text"
        )
    return samples


def check_sources(
    base: BaseModel, config: CalibrationConfig, data_root: Path | None
) -> None:
    """Read the sources that are not `self`, before any work, and keep nothing.

    Raises:
        QuantizeError: a source is unknown, cannot be read, or malformed.
    """
    reader = _reader(base, config, data_root)
    with _data_errors():
        for source in config.sources:
            if source != SELF:
                reader.read(source)


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
        with _data_errors():
            samples = list(_all_sources(base, config, data_root, progress))
        random.Random(config.seed).shuffle(samples)
        _save(samples, folder)
    return _load(folder)


def _all_sources(
    base: BaseModel,
    config: CalibrationConfig,
    data_root: Path | None,
    progress: Progress,
) -> Iterator[Sample]:
    reader = _reader(base, config, data_root)
    limit = getattr(base.model.config, "max_position_embeddings", None)
    for index, source in enumerate(config.sources):
        count = len(range(index, config.num_samples, len(config.sources)))
        if count == 0:
            continue
        if source == SELF:
            _check_window(config.seq_len, limit)
            yield from map(Sample.of, generate_windows(base, config, count, progress))
            continue
        found = reader.read(source)
        if found.is_text or config.packing:
            _check_window(config.seq_len, limit)
            chosen = cut_windows(found.samples, config.seq_len, count, config.seed)
        else:
            chosen = take_whole(found.samples, count * config.seq_len, limit)
        name = Path(source).name
        if not chosen.samples:
            raise QuantizeError(f"calibration source {name!r}: no text to use")
        if chosen.ran_out:
            used = sum(sample.tokens.numel() for sample in chosen.samples)
            progress.note(
                f"{name}: {used} tokens, fewer than the {count * config.seq_len} asked "
                "for; each is used once"
            )
        if chosen.too_long:
            progress.note(
                f"{name}: {chosen.too_long} samples left out, longer than the model's "
                f"{limit} positions"
            )
        yield from chosen.samples


def _reader(
    base: BaseModel, config: CalibrationConfig, data_root: Path | None
) -> SampleReader:
    completions_only = config.loss == "completion"
    return SampleReader(base.tokenizer, completions_only, data_root, config.seed)


@contextmanager
def _data_errors() -> Iterator[None]:
    try:
        yield
    except DataError as error:
        raise QuantizeError(str(error)) from error


def _check_window(seq_len: int, limit: int | None) -> None:
    if limit is not None and seq_len > limit:
        raise QuantizeError(
            f"windows of {seq_len} tokens, more than the model's {limit} positions: "
            "choose a smaller --seq-len"
        )


@dataclass(frozen=True)
class Chosen:
    """What was taken from a source."""

    samples: list[Sample]
    ran_out: bool
    """The source holds less than was asked for."""
    too_long: int = 0
    """Samples that were left out."""


def cut_windows(texts: Iterable[Sample], seq_len: int, count: int, seed: int) -> Chosen:
    """Windows at random places of joined texts; all of them, once, if that is less.

    Args:
        texts: as many of them are joined as hold a few times the tokens needed.
        seq_len: tokens of a window.
        count: number of windows.
        seed: of their places.
    """
    wanted = count * seq_len
    parts: list[Sample] = []
    total = 0
    for text in texts:
        parts.append(text)
        total += text.tokens.numel()
        if total >= _TEXT_MARGIN * wanted:
            break
    tokens = join_tokens(parts)
    if total < wanted:
        windows = [part for part in tokens.split(seq_len) if part.numel() > 1]
        return Chosen([Sample.of(window) for window in windows], ran_out=True)
    generator = torch.Generator().manual_seed(seed)
    last = max(total - seq_len, 1)
    starts = torch.randint(last, (count,), generator=generator).tolist()
    windows = [tokens[start : start + seq_len] for start in starts]
    return Chosen([Sample.of(window) for window in windows], ran_out=False)


def take_whole(samples: Iterable[Sample], budget: int, limit: int | None) -> Chosen:
    """Whole samples in order until the next would exceed the budget.

    Args:
        samples: to choose from.
        budget: tokens in all; one sample is taken in any case.
        limit: longest sample that the model can take, or None.
    """
    chosen: list[Sample] = []
    total = too_long = 0
    for sample in samples:
        size = sample.tokens.numel()
        if limit is not None and size > limit:
            too_long += 1
        elif size > 1:
            total += size
            if chosen and total > budget:
                return Chosen(chosen, ran_out=False, too_long=too_long)
            chosen.append(sample)
    return Chosen(chosen, ran_out=total < budget, too_long=too_long)


def _tokenizer_digest(tokenizer: Any) -> str:
    """Of all that its tokens depend on; of a slow one, the vocabulary.

    Special tokens have their parts, which chat templates and `self` write.
    """
    special = sorted(tokenizer.special_tokens_map.items())
    fast = getattr(tokenizer, "backend_tokenizer", None)
    if fast is None:
        return digest([*special, *sorted(tokenizer.get_vocab().items())])
    content = json.loads(fast.to_str())
    # Each call sets these two for itself.
    passing = ("truncation", "padding")
    kept = [item for item in content.items() if item[0] not in passing]
    return digest([*special, *kept])


def _named_files(sources: Iterable[str], data_root: Path | None) -> list[list[Any]]:
    """Names, sizes and times of the files that named sets may be read from."""
    folders = [data_root / name for name in sources if data_root and name in NAMED_SETS]
    return [
        [str(path.absolute()), *file_stamp(path)]
        for folder in folders
        for path in sorted(folder.glob("*.*"))
    ]


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
