"""Which samples a step has, and what goes through the model at once."""

from itertools import islice, pairwise

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from tacq_vllm.quantize.errors import QuantizeError
from tacq_vllm.quantize.samples import Sample
from tacq_vllm.recover.batches import (
    count_steps,
    hold_out,
    plan_steps,
    split_step,
    stack_samples,
)
from tests.conftest import random_samples

LENGTHS = st.lists(st.integers(2, 40), min_size=1, max_size=20)


@given(count=st.integers(2, 300), share=st.floats(0.01, 0.99))
@example(count=2, share=0.99)
def test_some_samples_are_held_out_and_some_are_not(count: int, share: float):
    train, held = hold_out(count, share)

    assert [*train, *held] == list(range(count))
    assert len(train) >= 1
    assert len(held) >= 1
    assert abs(len(held) - share * count) <= 1


def test_one_sample_cannot_be_divided():
    with pytest.raises(QuantizeError, match="one sample"):
        hold_out(1, 0.1)


@given(lengths=LENGTHS, batch_tokens=st.integers(1, 100), seed=st.integers(0, 3))
def test_every_epoch_has_every_sample_once(
    lengths: list[int], batch_tokens: int, seed: int
):
    steps = list(islice(plan_steps(lengths, batch_tokens, seed), 3 * len(lengths)))
    order = [number for step in steps for number in step]

    for start in range(0, len(order) - len(lengths) + 1, len(lengths)):
        epoch = order[start : start + len(lengths)]
        assert sorted(epoch) == list(range(len(lengths)))
    for step in steps:
        assert len(step) == 1 or sum(lengths[n] for n in step) <= batch_tokens
    for step, following in pairwise(steps):
        assert sum(lengths[n] for n in [*step, following[0]]) > batch_tokens
    count = count_steps(lengths, batch_tokens, seed, 2)
    assert sum(map(len, steps[:count])) >= 2 * len(lengths)
    assert sum(map(len, steps[: count - 1])) < 2 * len(lengths)


def test_epochs_and_seeds_have_orders_of_their_own():
    first, second = islice(plan_steps([1] * 50, 50, 0), 2)
    (other,) = islice(plan_steps([1] * 50, 50, 1), 1)

    assert first != second
    assert first != other
    assert next(plan_steps([1] * 50, 50, 0)) == first


@given(lengths=LENGTHS, micro_tokens=st.integers(1, 100))
def test_batches_are_of_similar_lengths(lengths: list[int], micro_tokens: int):
    batches = split_step(range(len(lengths)), lengths, micro_tokens)

    assert sorted(n for batch in batches for n in batch) == list(range(len(lengths)))
    for batch in batches:
        longest = max(lengths[n] for n in batch)
        assert len(batch) == 1 or len(batch) * longest <= micro_tokens
    sizes = [lengths[n] for batch in batches for n in batch]
    assert sizes == sorted(sizes)


def test_shorter_samples_are_padded_with_what_does_not_count():
    samples = random_samples(5, 3)
    states = [torch.ones(5, 4, dtype=torch.bfloat16), torch.ones(3, 4).bfloat16()]

    batch = stack_samples(samples, states, torch.device("cpu"))

    assert batch.tokens.tolist() == [
        samples[0].tokens.tolist(),
        [*samples[1].tokens.tolist(), 0, 0],
    ]
    assert batch.targets[1].tolist() == [
        *samples[1].targets().tolist(),
        Sample.UNSCORED,
        Sample.UNSCORED,
    ]
    assert not batch.scored[1, 2:].any()
    assert batch.states.dtype == torch.float32
    assert batch.states[1].sum(1).tolist() == [4, 4, 4, 0, 0]
    assert stack_samples(samples, None, torch.device("cpu")).states is None
