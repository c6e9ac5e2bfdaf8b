"""Samples to steps, and to the batches that go through the model at once."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from random import Random

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tacq_vllm.quantize.errors import QuantizeError
from tacq_vllm.quantize.samples import Sample


@dataclass(frozen=True)
class Batch:
    """Samples of a batch; shorter ones are padded at the end.

    No token of a causal model sees what comes after it, so padding changes nothing.
    """

    tokens: Tensor
    """int64 [batch, n]."""
    targets: Tensor
    """int64 [batch, n - 1]: what each token is to predict, or `Sample.UNSCORED`."""
    states: Tensor | None
    """What the 16-bit model's head is given, [batch, n, hidden]."""

    @property
    def scored(self) -> Tensor:
        """Bool [batch, n - 1]: the predictions that count."""
        return self.targets != Sample.UNSCORED


def stack_samples(
    samples: Sequence[Sample], states: Sequence[Tensor] | None, device: torch.device
) -> Batch:
    """Make a batch of samples and of the 16-bit model's states [n, hidden] for each."""
    tokens = pad_sequence([s.tokens for s in samples], batch_first=True)
    targets = pad_sequence(
        [s.targets() for s in samples],
        batch_first=True,
        padding_value=Sample.UNSCORED,
    )
    padded = None
    if states is not None:
        padded = pad_sequence(list(states), batch_first=True)
        padded = padded.to(device, torch.float32)
    return Batch(tokens.to(device), targets.to(device), padded)


def hold_out(count: int, share: float) -> tuple[range, range]:
    """Divide samples, which are in random order: those to train on, and the others.

    Raises:
        QuantizeError: there are fewer than two.
    """
    if count < 2:
        raise QuantizeError(
            "one sample cannot be both trained on and held out: give more text, or a "
            "smaller seq_len"
        )
    held = min(max(1, round(share * count)), count - 1)
    return range(count - held), range(count - held, count)


def plan_steps(
    lengths: Sequence[int], batch_tokens: int, seed: int
) -> Iterator[list[int]]:
    """Yield the numbers of each step's samples, without end.

    Every epoch has all samples, in another order.

    Args:
        lengths: tokens of each sample.
        batch_tokens: tokens of a step; it has one sample in any case.
        seed: of the orders.
    """
    step: list[int] = []
    tokens = 0
    for epoch in count():
        order = list(range(len(lengths)))
        Random(f"{seed}-{epoch}").shuffle(order)
        for number in order:
            if step and tokens + lengths[number] > batch_tokens:
                yield step
                step, tokens = [], 0
            step.append(number)
            tokens += lengths[number]


def count_steps(
    lengths: Sequence[int], batch_tokens: int, seed: int, epochs: float
) -> int:
    """Steps after which as many samples were seen as `epochs` have."""
    wanted = epochs * len(lengths)
    seen = 0
    for number, step in enumerate(plan_steps(lengths, batch_tokens, seed), 1):
        seen += len(step)
        if seen >= wanted:
            return number
    raise AssertionError("steps have no end")


def split_step(
    step: Sequence[int], lengths: Sequence[int], micro_tokens: int
) -> list[list[int]]:
    """Divide a step's samples into batches of similar lengths.

    Args:
        step: the samples' numbers.
        lengths: tokens of each sample.
        micro_tokens: tokens of a batch, padding included; one sample in any case.
    """
    batches: list[list[int]] = []
    for number in sorted(step, key=lambda number: (lengths[number], number)):
        # The longest so far, to which all others are padded.
        if batches and (len(batches[-1]) + 1) * lengths[number] <= micro_tokens:
            batches[-1].append(number)
        else:
            batches.append([number])
    return batches
