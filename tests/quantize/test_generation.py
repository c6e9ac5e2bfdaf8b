import dataclasses
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from tacq_vllm.config import CalibrationConfig
from tacq_vllm.quantize.errors import QuantizeError
from tacq_vllm.quantize.generation import generate_windows
from tacq_vllm.quantize.model import BaseModel
from tacq_vllm.quantize.progress import Progress
from tests.conftest import (
    Recorder,
    assert_released,
    make_chat_tokenizer,
    make_tokenizer,
)


def with_tokenizer(base: BaseModel, tokenizer: PreTrainedTokenizerFast) -> BaseModel:
    return dataclasses.replace(base, tokenizer=tokenizer)


@pytest.fixture
def chat_base(tiny_base: BaseModel) -> BaseModel:
    return with_tokenizer(tiny_base, make_chat_tokenizer())


def generate(
    base: BaseModel, count: int, listener: Recorder | None = None, **fields: Any
) -> torch.Tensor:
    config = CalibrationConfig(**({"seq_len": 8} | fields))
    windows = generate_windows(base, config, count, Progress(listener))
    return torch.stack(windows)


def test_the_model_writes_windows_itself(tiny_base: BaseModel) -> None:
    recorder = Recorder()

    # More than one batch of generation.
    windows = generate(tiny_base, 37, recorder)

    assert windows.shape == (37, 8)
    assert bool((windows[:, 0] == tiny_base.tokenizer.bos_token_id).all())
    assert len(windows.unique(dim=0)) == 37
    assert recorder.phases == {"self-generation": 37}
    assert_released(tiny_base)


def test_the_end_of_a_turn_does_not_end_a_window(tiny_base: BaseModel) -> None:
    windows = generate(tiny_base, 96)

    ends = (windows[:, :-1] == tiny_base.tokenizer.eos_token_id).nonzero()
    assert len(ends) > 0
    # Padding would be zeros.
    assert any(int(windows[row, column + 1]) for row, column in ends.tolist())


def test_windows_are_seeded(tiny_base: BaseModel) -> None:
    torch.manual_seed(3)
    state = torch.random.get_rng_state()
    first, again, other = (generate(tiny_base, 3, seed=seed) for seed in (1, 1, 2))

    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_temperature_flattens_what_is_written(tiny_base: BaseModel) -> None:
    def variety(temperature: float) -> int:
        windows = generate(tiny_base, 64, temperature=temperature, seq_len=2)
        return len(windows[:, 1].unique())

    assert variety(0.01) == 1
    assert variety(5.0) > 20


def test_a_chat_model_opens_with_the_turn_of_a_user(chat_base: BaseModel) -> None:
    windows = generate(chat_base, 2)

    opening = torch.tensor(chat_base.tokenizer("<s> user").input_ids)
    assert windows.shape == (2, 8)
    assert bool((windows[:, : len(opening)] == opening).all())


def test_a_window_must_hold_more_than_the_opening(chat_base: BaseModel) -> None:
    with pytest.raises(QuantizeError, match="seq_len 2 leaves no room"):
        generate(chat_base, 1, seq_len=2)


def test_without_a_first_token_there_is_no_text(tiny_base: BaseModel) -> None:
    tokenizer = make_tokenizer()
    tokenizer.bos_token = None
    assert bool((generate(with_tokenizer(tiny_base, tokenizer), 2)[:, 0] == 2).all())
    tokenizer.eos_token = None

    with pytest.raises(QuantizeError, match="no first token to generate from"):
        generate(with_tokenizer(tiny_base, tokenizer), 2)
