from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from tacq_vllm.quantize.blocks import (
    BlockCalls,
    batch_windows,
    group_linears,
    run_block,
)
from tacq_vllm.quantize.errors import QuantizeError
from tacq_vllm.quantize.model import BaseModel
from tests.conftest import VOCAB_SIZE, assert_released

Linears = dict[str, nn.Linear]
Seen = dict[str, list[Tensor]]


@pytest.fixture(scope="module")
def batches() -> list[Tensor]:
    """Four batches of samples, of three shapes."""
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randint(VOCAB_SIZE, shape, generator=generator)
        for shape in ((2, 12), (1, 7), (3, 12), (1, 7))
    ]


class Forwards:
    """The forward passes of a resident block, one for each batch."""

    def __init__(self, base: BaseModel, batches: list[Tensor]) -> None:
        self.calls = BlockCalls(base)
        with base.resident_outside():
            self.hidden = [self.calls.embed(batch) for batch in batches]

    def __call__(self, block: nn.Module, index: int) -> list[Callable[[], Tensor]]:
        return [partial(self.calls.run, block, index, x) for x in self.hidden]


def halve(group: Linears) -> None:
    for linear in group.values():
        linear.weight.data = linear.weight.data / 2


def run_and_halve(
    base: BaseModel, batches: list[Tensor], in_memory: int
) -> tuple[Seen, list[Tensor]]:
    """What linears of the first block see while they are halved, and its outputs."""
    seen: Seen = {}

    def on_group(group: Linears, xs: Iterator[Tensor]) -> None:
        inputs = [x.clone() for x in xs]
        seen.update(dict.fromkeys(group, inputs))
        halve(group)

    forwards = Forwards(base, batches)
    with base.resident_block(0) as block:
        groups = group_linears(base.block_linears(0))
        outputs = list(run_block(forwards(block, 0), groups, in_memory, on_group))
    return seen, outputs


def plainly_run_and_halve(
    base: BaseModel, batches: list[Tensor]
) -> tuple[Seen, list[Tensor]]:
    """The same by a whole forward pass for each group and each batch."""
    seen: Seen = {}
    forwards = Forwards(base, batches)
    with base.resident_block(0) as block:
        for group in group_linears(base.block_linears(0)):
            for name, linear in group.items():
                seen[name] = []
                hook = linear.register_forward_hook(
                    lambda module, args, output, name=name: seen[name].append(args[0])
                )
                for forward in forwards(block, 0):
                    forward()
                hook.remove()
            halve(group)
        return seen, [forward() for forward in forwards(block, 0)]


def test_neighbours_of_equal_length_share_a_batch() -> None:
    windows = [torch.full((n,), n) for n in (4, 4, 4, 4, 4, 3, 4)]

    batches = batch_windows(windows, 12)

    assert [tuple(batch.shape) for batch in batches] == [(3, 4), (2, 4), (1, 3), (1, 4)]
    assert all(bool((batch == batch.shape[1]).all()) for batch in batches)


def test_a_window_longer_than_a_batch_stands_alone() -> None:
    batches = batch_windows([torch.zeros(9), torch.zeros(9)], 5)

    assert [tuple(batch.shape) for batch in batches] == [(1, 9), (1, 9)]


def test_groups_share_their_input(tiny_base: BaseModel) -> None:
    groups = group_linears(tiny_base.block_linears(1))

    leaves = [[name.rsplit(".", 1)[-1] for name in group] for group in groups]
    assert leaves == [
        ["q_proj", "k_proj", "v_proj"],
        ["o_proj"],
        ["gate_proj", "up_proj"],
        ["down_proj"],
    ]


def test_equal_names_under_different_parents_are_apart() -> None:
    linear = nn.Linear(1, 1)
    names = ["experts.0.gate_proj", "experts.1.gate_proj", "experts.0.up_proj"]

    groups = group_linears(dict.fromkeys(names, linear))

    assert [list(group) for group in groups] == [[names[0], names[2]], [names[1]]]


@torch.no_grad()
def test_block_by_block_is_the_whole_model(
    tiny_base: BaseModel, plain_model: LlamaForCausalLM, batches: list[Tensor]
) -> None:
    forwards = Forwards(tiny_base, batches)
    states = forwards.hidden
    for index in range(len(tiny_base.blocks)):
        with tiny_base.resident_block(index) as block:
            states = [forwards.calls.run(block, index, x) for x in states]
    with tiny_base.resident_outside():
        logits = [forwards.calls.logits(x) for x in states]

    for tokens, part in zip(batches, logits, strict=True):
        expected = plain_model(tokens).logits
        torch.testing.assert_close(part, expected, rtol=1e-5, atol=1e-5)
    assert_released(tiny_base)


@torch.no_grad()
def test_linears_see_what_they_see_in_the_whole_model(
    tiny_base: BaseModel, plain_model: LlamaForCausalLM, batches: list[Tensor]
) -> None:
    seen: Seen = {}
    expected: Seen = {name: [] for name in tiny_base.linears()}
    for name, inputs in expected.items():
        plain_model.get_submodule(name).register_forward_hook(
            lambda module, args, output, inputs=inputs: inputs.append(args[0])
        )

    def record(group: Linears, xs: Iterator[Tensor]) -> None:
        inputs = [x.clone() for x in xs]
        seen.update(dict.fromkeys(group, inputs))

    forwards = Forwards(tiny_base, batches)
    for index in range(len(tiny_base.blocks)):
        with tiny_base.resident_block(index) as block:
            groups = group_linears(tiny_base.block_linears(index))
            outputs = run_block(forwards(block, index), groups, 9, record)
            forwards.hidden = list(outputs)
    for tokens in batches:
        plain_model(tokens)

    assert list(seen) == list(expected)
    for name, inputs in seen.items():
        for x, other in zip(inputs, expected[name], strict=True):
            torch.testing.assert_close(x, other, rtol=1e-5, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("in_memory", [0, 1, 3, 4, 100])
def test_every_batch_sees_the_changed_weights(
    tiny_base: BaseModel, batches: list[Tensor], in_memory: int
) -> None:
    seen, outputs = run_and_halve(tiny_base, batches, in_memory)

    expected, expected_outputs = plainly_run_and_halve(tiny_base, batches)
    assert list(seen) == list(expected)
    for name, inputs in seen.items():
        assert len(inputs) == len(batches)
        for x, other in zip(inputs, expected[name], strict=True):
            assert torch.equal(x, other)
    for output, other in zip(outputs, expected_outputs, strict=True):
        assert torch.equal(output, other)


@torch.no_grad()
def test_the_changed_weights_make_a_difference(
    tiny_base: BaseModel, batches: list[Tensor]
) -> None:
    name = "model.layers.0.mlp.down_proj"
    seen, _ = run_and_halve(tiny_base, batches, 9)
    forwards, unchanged = Forwards(tiny_base, batches), []
    with tiny_base.resident_block(0) as block:
        hook = tiny_base.linears()[name].register_forward_hook(
            lambda module, args, output: unchanged.append(args[0])
        )
        for forward in forwards(block, 0):
            forward()
        hook.remove()

    for x, other in zip(seen[name], unchanged, strict=True):
        assert float((x - other).norm()) > 0.1 * float(other.norm())


@torch.no_grad()
@pytest.mark.parametrize(("in_memory", "runs"), [(4, 1), (9, 1), (0, 4)])
def test_how_often_linears_run(
    tiny_base: BaseModel, batches: list[Tensor], in_memory: int, runs: int
) -> None:
    ran: Counter[str] = Counter()
    linears = tiny_base.block_linears(0)
    hooks = [
        linear.register_forward_hook(
            lambda module, args, output, name=name: ran.update([name])
        )
        for name, linear in linears.items()
    ]

    run_and_halve(tiny_base, batches, in_memory)

    for hook in hooks:
        hook.remove()
    # Without memory a pass starts anew for each of four groups, and at the end.
    first, *_, last = linears
    assert ran[first] == runs * len(batches)
    assert ran[last] == len(batches)


@torch.no_grad()
@pytest.mark.parametrize("in_memory", [0, 2, 9])
def test_a_failure_leaves_no_hooks(
    tiny_base: BaseModel, batches: list[Tensor], in_memory: int
) -> None:
    def fail(group: Linears, xs: Iterator[Tensor]) -> None:
        next(xs)
        raise QuantizeError("no")

    forwards = Forwards(tiny_base, batches)
    with tiny_base.resident_block(0) as block:
        groups = group_linears(tiny_base.block_linears(0))
        outputs = run_block(forwards(block, 0), groups, in_memory, fail)
        with pytest.raises(QuantizeError, match="no"):
            next(outputs)

    assert_released(tiny_base)


class Wayward(nn.Module):
    """Takes its linears in an order that depends on its input."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        first, second = (self.a, self.b) if bool(x.sum() > 0) else (self.b, self.a)
        return second(first(x))


@torch.no_grad()
@pytest.mark.parametrize("in_memory", [0, 2])
def test_samples_in_different_orders_are_refused(in_memory: int) -> None:
    block = Wayward()
    forwards = [partial(block, x) for x in (torch.ones(1, 2), -torch.ones(1, 2))]
    groups: list[Linears] = [{"a": block.a}, {"b": block.b}]

    outputs = run_block(forwards, groups, in_memory, lambda group, xs: list(xs))
    with pytest.raises(QuantizeError, match="in different orders"):
        next(outputs)


def test_blocks_called_with_positional_arguments_are_refused() -> None:
    block = nn.Linear(2, 2)
    base = SimpleNamespace(
        blocks=[block],
        device=torch.device("cpu"),
        model=SimpleNamespace(
            get_decoder=lambda: lambda tokens, use_cache: block(tokens, None),
        ),
    )

    with pytest.raises(QuantizeError, match="positional arguments"):
        BlockCalls(base).embed(torch.zeros(1, 2))
    assert "forward" not in vars(block)
