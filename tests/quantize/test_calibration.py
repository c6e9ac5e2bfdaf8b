import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from tacq_vllm.config import CalibrationConfig
from tacq_vllm.quantize.calibration import (
    calibration_windows,
    file_windows,
    generate_windows,
)
from tacq_vllm.quantize.errors import QuantizeError
from tacq_vllm.quantize.model import BaseModel
from tacq_vllm.quantize.progress import Progress
from tests.conftest import make_text, make_tokenizer

TEMPLATE = "{% for m in messages %}<s> {{ m.role }} {{ m.content }} </s>{% endfor %}"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture
def chat_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture
def chat_base(
    tiny_base: BaseModel, chat_tokenizer: PreTrainedTokenizerFast
) -> BaseModel:
    return BaseModel("chat", tiny_base.model, chat_tokenizer, tiny_base.stored_dtype)


def make_config(**fields: Any) -> CalibrationConfig:
    return CalibrationConfig(**({"num_samples": 4, "seq_len": 8} | fields))


def words(tokenizer: PreTrainedTokenizerFast, window: Tensor) -> str:
    return " ".join(tokenizer.convert_ids_to_tokens(window.tolist()))


def write_lines(path: Path, samples: list[Any]) -> Path:
    path.write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    return path


@pytest.mark.parametrize("suffix", [".txt", ".txt.gz"])
def test_text_files(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, suffix: str
) -> None:
    path = tmp_path / f"text{suffix}"
    content = make_text().encode()
    path.write_bytes(gzip.compress(content) if suffix.endswith(".gz") else content)

    windows = file_windows(tokenizer, path, make_config(), 6)

    assert len(windows) == 6
    for window in windows:
        assert window.dtype == torch.int64
        assert window.shape == (8,)
        assert words(tokenizer, window) in make_text()
    assert len({words(tokenizer, window) for window in windows}) > 1


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_every_kind_of_sample(
    chat_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, suffix: str
) -> None:
    samples = [
        {"text": "the old river", "id": 7},
        {"prompt": "the new city ", "completion": "sells a train"},
        {"messages": [{"role": "loud", "content": "the song"}]},
    ]
    lines = "\n\n".join(json.dumps(sample) for sample in samples).encode()
    path = tmp_path / f"samples{suffix}"
    path.write_bytes(gzip.compress(lines) if suffix.endswith(".gz") else lines)

    (window,) = file_windows(chat_tokenizer, path, make_config(seq_len=14), 1)

    assert words(chat_tokenizer, window) == (
        "the old river the new city sells a train <s> loud the song </s>"
    )


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "not JSON"),
        ("[1, 2]", "none of `text`"),
        ('{"text": 3}', "none of `text`"),
        ('{"prompt": "the old river"}', "none of `text`"),
        ('{"messages": "the old river"}', "none of `text`"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "chat template"),
    ],
)
def test_bad_lines_are_named_by_their_number(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, line: str, reason: str
) -> None:
    path = tmp_path / "samples.jsonl"
    path.write_text(f'{{"text": "{make_text(20)}"}}\n\n{line}\n')

    with pytest.raises(QuantizeError, match=rf"samples\.jsonl, line 3: .*{reason}"):
        file_windows(tokenizer, path, make_config(), 1)


def test_messages_that_the_template_cannot_render(
    chat_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    chat_tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    path = write_lines(tmp_path / "samples.jsonl", [{"messages": [{"role": "user"}]}])

    with pytest.raises(QuantizeError, match=r"line 1: .*roles must alternate"):
        file_windows(chat_tokenizer, path, make_config(), 1)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("missing.txt", None, "no such file"),
        ("table.csv", b"a,b", r"a \.txt or \.jsonl file"),
        ("short.txt", b"the old river", "3 tokens, fewer than one window of 8"),
        ("empty.jsonl", b"", "0 tokens, fewer than one window of 8"),
        ("latin.txt", b"\xe9t\xe9", "cannot be read"),
        ("plain.txt.gz", b"the old river", "cannot be read"),
        ("cut.txt.gz", gzip.compress(b"the old river" * 99)[:-20], "cannot be read"),
    ],
)
def test_unusable_files_are_refused(
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    name: str,
    content: bytes | None,
    reason: str,
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)

    with pytest.raises(QuantizeError, match=rf"{name}.*{reason}"):
        file_windows(tokenizer, path, make_config(), 1)


def test_a_file_of_one_window_gives_it(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path = tmp_path / "text.txt"
    path.write_text("the old river follows a garden again .")

    windows = file_windows(tokenizer, path, make_config(), 3)

    assert {words(tokenizer, window) for window in windows} == {path.read_text()}


def test_files_are_sampled_by_seed(
    tokenizer: PreTrainedTokenizerFast, text_file: Path
) -> None:
    first, again, other = (
        torch.stack(file_windows(tokenizer, text_file, make_config(seed=seed), 4))
        for seed in (1, 1, 2)
    )

    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_model_writes_windows_itself(tiny_base: BaseModel) -> None:
    # More than one batch of generation.
    windows = generate_windows(tiny_base, make_config(), 37, Progress())

    assert len(windows) == 37
    for window in windows:
        assert window.shape == (8,)
        assert window[0] == tiny_base.tokenizer.bos_token_id
    assert len({tuple(window.tolist()) for window in windows}) == 37


def test_the_end_of_a_turn_does_not_end_a_window(tiny_base: BaseModel) -> None:
    windows = torch.stack(generate_windows(tiny_base, make_config(), 96, Progress()))

    ends = (windows[:, :-1] == tiny_base.tokenizer.eos_token_id).nonzero()
    assert len(ends) > 0
    # Padding would be zeros.
    assert any(int(windows[row, column + 1]) for row, column in ends.tolist())


def test_self_windows_are_seeded(tiny_base: BaseModel) -> None:
    torch.manual_seed(3)
    state = torch.random.get_rng_state()
    first, again, other = (
        torch.stack(generate_windows(tiny_base, make_config(seed=s), 3, Progress()))
        for s in (1, 1, 2)
    )

    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_temperature_flattens_what_is_written(tiny_base: BaseModel) -> None:
    def variety(temperature: float) -> int:
        config = make_config(temperature=temperature, seq_len=2)
        windows = generate_windows(tiny_base, config, 64, Progress())
        return len({int(window[1]) for window in windows})

    assert variety(0.01) == 1
    assert variety(5.0) > 20


def test_a_chat_model_opens_with_the_turn_of_a_user(chat_base: BaseModel) -> None:
    windows = generate_windows(chat_base, make_config(), 2, Progress())

    opening = chat_base.tokenizer("<s> user").input_ids
    assert all(window[: len(opening)].tolist() == opening for window in windows)
    assert all(window.shape == (8,) for window in windows)


def test_a_window_must_hold_more_than_the_opening(chat_base: BaseModel) -> None:
    with pytest.raises(QuantizeError, match="seq_len 2 leaves no room"):
        generate_windows(chat_base, make_config(seq_len=2), 1, Progress())


def test_sources_share_the_samples(
    tiny_base: BaseModel, text_file: Path, tmp_path: Path
) -> None:
    zeros = tmp_path / "unknown.txt"
    zeros.write_text("? " * 50)
    config = make_config(
        num_samples=8, sources=("self", str(text_file), str(zeros)), seed=5
    )

    windows = calibration_windows(tiny_base, config, Progress())

    kinds = [
        "self" if window[0] == 1 else "zeros" if not window.any() else "text"
        for window in windows
    ]
    assert sorted(kinds) == ["self"] * 3 + ["text"] * 3 + ["zeros"] * 2
    assert kinds != sorted(kinds)
    again = calibration_windows(tiny_base, config, Progress())
    assert torch.equal(torch.stack(windows), torch.stack(again))


def test_more_sources_than_samples(tiny_base: BaseModel, text_file: Path) -> None:
    config = make_config(num_samples=1, sources=(str(text_file), "self"))

    (window,) = calibration_windows(tiny_base, config, Progress())

    assert words(tiny_base.tokenizer, window) in make_text()
