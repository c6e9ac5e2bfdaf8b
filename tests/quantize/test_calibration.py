import json
import os
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tacq_vllm.config import CalibrationConfig
from tacq_vllm.quantize.calibration import calibrate as run_calibration
from tacq_vllm.quantize.calibration import calibration_samples
from tacq_vllm.quantize.errors import QuantizeError
from tacq_vllm.quantize.model import BaseModel
from tacq_vllm.quantize.progress import Progress
from tacq_vllm.quantize.samples import Sample
from tacq_vllm.quantize.workdir import PhaseFolder, WorkDir
from tacq_vllm.quantize.world import World
from tests.builders import write_lines
from tests.conftest import Recorder, make_text, scored_words, words


def make_config(*sources: Path | str, **fields: Any) -> CalibrationConfig:
    defaults = {"num_samples": 4, "seq_len": 8, "sources": tuple(map(str, sources))}
    return CalibrationConfig(**(defaults | fields))


def calibrate(
    base: BaseModel,
    config: CalibrationConfig,
    folder: PhaseFolder,
    listener: Recorder | None = None,
    data_root: Path | None = None,
) -> list[Sample]:
    return calibration_samples(base, config, data_root, folder, Progress(listener))


def count_tokens(samples: list[Sample]) -> int:
    return sum(sample.tokens.numel() for sample in samples)


def test_text_becomes_windows(
    tiny_base: BaseModel, text_file: Path, phase_folder: PhaseFolder
) -> None:
    recorder = Recorder()

    samples = calibrate(tiny_base, make_config(text_file), phase_folder, recorder)

    assert len(samples) == 4
    for sample in samples:
        assert sample.tokens.dtype == torch.int64
        assert sample.tokens.shape == (8,)
        assert words(tiny_base.tokenizer, sample.tokens) in make_text()
    assert recorder.notes == []


def test_tasks_stay_whole(
    tiny_base: BaseModel, task_file: Path, phase_folder: PhaseFolder
) -> None:
    tasks = [json.loads(line) for line in task_file.read_text().splitlines()]
    whole = {task["prompt"] + task["completion"] for task in tasks}
    config = make_config(task_file, num_samples=20, seq_len=8)

    samples = calibrate(tiny_base, config, phase_folder)

    assert {words(tiny_base.tokenizer, sample.tokens) for sample in samples} < whole
    assert len({sample.tokens.numel() for sample in samples}) > 2
    longest = max(sample.tokens.numel() for sample in samples)
    assert 160 - longest < count_tokens(samples) <= 160


def test_packed_tasks_become_windows(
    tiny_base: BaseModel, task_file: Path, phase_folder: PhaseFolder
) -> None:
    tasks = [json.loads(line) for line in task_file.read_text().splitlines()]
    whole = {task["prompt"] + task["completion"] for task in tasks}
    config = make_config(task_file, num_samples=4, seq_len=30, packing=True)

    samples = calibrate(tiny_base, config, phase_folder)

    assert [sample.tokens.numel() for sample in samples] == [30] * 4
    assert all(bool(sample.scored.all()) for sample in samples)
    assert not whole & {words(tiny_base.tokenizer, sample.tokens) for sample in samples}


@pytest.mark.parametrize(("loss", "share"), [("all", 1.0), ("completion", 0.4)])
def test_the_loss_decides_what_is_scored(
    tiny_base: BaseModel,
    task_file: Path,
    phase_folder: PhaseFolder,
    loss: str,
    share: float,
) -> None:
    config = make_config(task_file, num_samples=40, loss=loss)

    samples = calibrate(tiny_base, config, phase_folder)

    scored = torch.cat([sample.scored for sample in samples])
    assert float(scored.float().mean()) == pytest.approx(share, abs=0.1)
    ends = {scored_words(tiny_base.tokenizer, sample) for sample in samples}
    assert all(end.startswith("the") for end in ends)


def test_a_source_that_runs_out_is_told(
    tiny_base: BaseModel, tmp_path: Path, phase_folder: PhaseFolder
) -> None:
    path = tmp_path / "short.txt"
    path.write_text("the old river follows a garden again . the city")
    recorder = Recorder()

    samples = calibrate(tiny_base, make_config(path), phase_folder, recorder)

    assert sorted(sample.tokens.numel() for sample in samples) == [2, 8]
    (note,) = recorder.notes
    assert note.startswith("short.txt: 10 tokens, fewer than the 32 asked for")


def test_samples_that_are_left_out_are_told(
    tiny_base: BaseModel, tmp_path: Path, phase_folder: PhaseFolder
) -> None:
    path = tmp_path / "chat.jsonl"
    lines = [{"prompt": "the " * n, "completion": "old"} for n in (4, 127, 128, 300)]
    write_lines(path, lines)
    recorder = Recorder()
    config = make_config(path, num_samples=100)

    samples = calibrate(tiny_base, config, phase_folder, recorder)

    assert sorted(sample.tokens.numel() for sample in samples) == [5, 128]
    assert any(
        note.startswith("chat.jsonl: 2 samples left out") and "128" in note
        for note in recorder.notes
    )


def test_sources_share_the_samples(
    tiny_base: BaseModel, text_file: Path, tmp_path: Path
) -> None:
    zeros = tmp_path / "unknown.txt"
    zeros.write_text("? " * 50)
    config = make_config("self", text_file, zeros, num_samples=8, seed=5)

    first, again = (
        calibrate(tiny_base, config, WorkDir(tmp_path).phase(name, {}))
        for name in ("first", "again")
    )

    windows = [sample.tokens for sample in first]
    kinds = [
        "self" if window[0] == 1 else "zeros" if not window.any() else "text"
        for window in windows
    ]
    assert sorted(kinds) == ["self"] * 3 + ["text"] * 3 + ["zeros"] * 2
    assert kinds != sorted(kinds)
    for sample, other in zip(first, again, strict=True):
        assert torch.equal(sample.tokens, other.tokens)


def test_more_sources_than_samples(
    tiny_base: BaseModel, text_file: Path, task_file: Path, phase_folder: PhaseFolder
) -> None:
    config = make_config(text_file, task_file, "self", num_samples=1)

    (sample,) = calibrate(tiny_base, config, phase_folder)

    assert words(tiny_base.tokenizer, sample.tokens) in make_text()


def test_a_named_set(
    tiny_base: BaseModel, data_root: Path, phase_folder: PhaseFolder
) -> None:
    config = make_config("gsm8k", num_samples=100, loss="completion")
    recorder = Recorder()

    samples = calibrate(tiny_base, config, phase_folder, recorder, data_root)

    answers = {scored_words(tiny_base.tokenizer, sample) for sample in samples}
    assert answers == {f"a {x} again" for x in ("river", "city", "garden", "song")}
    (note,) = recorder.notes
    assert note.startswith(f"gsm8k: {count_tokens(samples)} tokens, fewer than the 800")


def test_samples_are_kept_for_the_next_run(
    tiny_base: BaseModel, task_file: Path, tmp_path: Path, phase_folder: PhaseFolder
) -> None:
    path = tmp_path / "task.jsonl"
    path.write_bytes(task_file.read_bytes())
    config = make_config(path, loss="completion", num_samples=20)
    first = calibrate(tiny_base, config, phase_folder)
    path.unlink()
    recorder = Recorder()

    again = calibrate(tiny_base, config, phase_folder, recorder)

    assert recorder.notes == ["calibration: taken from the work folder"]
    for sample, other in zip(first, again, strict=True):
        assert torch.equal(sample.tokens, other.tokens)
        assert torch.equal(sample.scored, other.scored)


@pytest.fixture
def is_found(
    tiny_base: BaseModel, data_root: Path, tmp_path: Path
) -> Callable[..., bool]:
    """Make samples as a run does; gives whether they were in its work folder."""

    def make(
        config: CalibrationConfig, common: str = "", tokenizer: Any = None
    ) -> bool:
        base = replace(tiny_base, tokenizer=tokenizer or tiny_base.tokenizer)
        recorder, work = Recorder(), WorkDir(tmp_path / "work")
        depends = {"common": common}
        run_calibration(
            base, config, depends, data_root, work, Progress(recorder), World()
        )
        return "calibration: taken from the work folder" in recorder.notes

    return make


@pytest.mark.parametrize(
    "fields",
    [
        {"num_samples": 5},
        {"seq_len": 9},
        {"packing": True},
        {"loss": "completion"},
        {"seed": 1},
        {"temperature": 0.9},
        {"sources": ("gsm8k", "self")},
    ],
)
def test_samples_of_other_choices_are_not_taken(
    is_found: Callable[..., bool], fields: dict[str, Any]
) -> None:
    config = make_config("gsm8k")

    assert not is_found(config)
    assert is_found(config)
    assert not is_found(make_config("gsm8k", **fields))
    assert not is_found(config, "another model")
    assert is_found(config)


def test_samples_of_other_files_are_not_taken(
    is_found: Callable[..., bool], data_root: Path, tmp_path: Path
) -> None:
    path, named = tmp_path / "text.txt", data_root / "gsm8k" / "train.jsonl"
    path.write_text("the old river")
    config, before = make_config(path, "gsm8k"), named.stat()

    assert not is_found(config)
    path.write_text("the new river")
    assert not is_found(config)
    os.utime(named, (1, 1))
    assert not is_found(config)
    os.utime(named, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert is_found(config)


@pytest.mark.parametrize(
    ("name", "value"),
    [("chat_template", "{{ messages[0].content }}"), ("bos_token", "river")],
)
def test_samples_of_another_tokenizer_are_not_taken(
    tiny_base: BaseModel, is_found: Callable[..., bool], name: str, value: str
) -> None:
    config, tokenizer = make_config("gsm8k"), deepcopy(tiny_base.tokenizer)
    setattr(tokenizer, name, value)

    assert not is_found(config)
    assert not is_found(config, tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("missing.txt", None, "no such file"),
        ("empty.txt", b"", "no text to use"),
        ("word.txt", b"river", "no text to use"),
        ("empty.jsonl", b"", "no text to use"),
        ("latin.txt", b"\xe9t\xe9", "cannot be read"),
        ("plain.txt.gz", b"the old river", "cannot be read"),
        ("bad.jsonl", b"{", "line 1: not JSON"),
    ],
)
def test_unusable_files_are_refused(
    tiny_base: BaseModel,
    tmp_path: Path,
    phase_folder: PhaseFolder,
    name: str,
    content: bytes | None,
    reason: str,
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)

    with pytest.raises(QuantizeError, match=rf"{name}.*{reason}"):
        calibrate(tiny_base, make_config(path), phase_folder)
    assert phase_folder.is_empty


def test_unusable_named_sets_are_refused(
    tiny_base: BaseModel, tmp_path: Path, phase_folder: PhaseFolder
) -> None:
    with pytest.raises(QuantizeError, match=r"gsm8k/train\.jsonl: no such file"):
        calibrate(tiny_base, make_config("gsm8k"), phase_folder, data_root=tmp_path)
