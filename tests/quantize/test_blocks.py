from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from tacq_vllm.quantize.blocks import (
    BlockInputs,
    batch_windows,
    capture_inputs,
    group_linears,
    run_block,
)
from tacq_vllm.quantize.errors import QuantizeError
from tacq_vllm.quantize.model import BaseModel
from tests.conftest import VOCAB_SIZE


@pytest.fixture(scope="module")
def batches() -> list[Tensor]:
    """Two batches of samples, of different lengths."""
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randint(VOCAB_SIZE, shape, generator=generator)
        for shape in ((2, 12), (1, 7))
    ]


def plain_inputs(base: BaseModel, batches: list[Tensor]) -> dict[str, list[Tensor]]:
    """What each linear sees when the whole model runs, by forward hooks."""
    seen: dict[str, list[Tensor]] = {name: [] for name in base.linears()}
    hooks = [
        linear.register_forward_hook(
            lambda module, args, output, name=name: seen[name].append(args[0])
        )
        for name, linear in base.linears().items()
    ]
    for tokens in batches:
        base.model(tokens, use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


def ignore(group: dict[str, nn.Linear], xs: list[Tensor]) -> None:
    """Quantize nothing."""


def walk(base: BaseModel, inputs: list[BlockInputs], on_group=ignore) -> None:
    for index, block in enumerate(base.blocks):
        groups = group_linears(base.block_linears(index))
        run_block(block, index, inputs, groups, on_group)


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
def test_linears_see_what_they_see_in_the_whole_model(
    tiny_base: BaseModel, batches: list[Tensor]
) -> None:
    seen: dict[str, list[Tensor]] = {}

    def record(group: dict[str, nn.Linear], xs: list[Tensor]) -> None:
        seen.update(dict.fromkeys(group, xs))

    walk(tiny_base, capture_inputs(tiny_base, batches), record)

    expected = plain_inputs(tiny_base, batches)
    assert list(seen) == list(expected)
    for name, xs in seen.items():
        assert len(xs) == len(batches)
        for x, other in zip(xs, expected[name], strict=True):
            torch.testing.assert_close(x, other, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_block_by_block_is_the_whole_model(
    tiny_base: BaseModel, batches: list[Tensor]
) -> None:
    inputs = capture_inputs(tiny_base, batches)

    walk(tiny_base, inputs)

    decoder = tiny_base.model.get_decoder()
    for batch, tokens in zip(inputs, batches, strict=True):
        states = decoder.norm(batch.hidden_states)
        whole = decoder(tokens, use_cache=False).last_hidden_state
        torch.testing.assert_close(states, whole, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_every_linear_runs_once_a_batch(
    tiny_base: BaseModel, batches: list[Tensor]
) -> None:
    runs: Counter[str] = Counter()
    hooks = [
        linear.register_forward_hook(
            lambda module, args, output, name=name: runs.update([name])
        )
        for name, linear in tiny_base.linears().items()
    ]

    walk(tiny_base, capture_inputs(tiny_base, batches))

    for hook in hooks:
        hook.remove()
    assert runs == dict.fromkeys(tiny_base.linears(), len(batches))


@torch.no_grad()
def test_later_linears_see_the_changed_weights(
    tiny_base: BaseModel, batches: list[Tensor]
) -> None:
    block, linears = tiny_base.blocks[0], tiny_base.block_linears(0)
    originals = {name: linear.weight.data for name, linear in linears.items()}
    seen: dict[str, Tensor] = {}

    def halve(group: dict[str, nn.Linear], xs: list[Tensor]) -> None:
        for name, linear in group.items():
            seen[name] = xs[0]
            linear.weight.data = linear.weight.data / 2

    inputs = capture_inputs(tiny_base, batches)
    run_block(block, 0, inputs, group_linears(linears), halve)

    expected = plain_inputs(tiny_base, batches[:1])
    for name, linear in linears.items():
        linear.weight.data = originals[name]
        torch.testing.assert_close(seen[name], expected[name][0], rtol=1e-5, atol=1e-6)
    assert not torch.equal(
        seen["model.layers.0.mlp.down_proj"],
        plain_inputs(tiny_base, batches[:1])["model.layers.0.mlp.down_proj"][0],
    )


@torch.no_grad()
def test_a_failure_leaves_no_hooks(tiny_base: BaseModel, batches: list[Tensor]) -> None:
    def fail(group: dict[str, nn.Linear], xs: list[Tensor]) -> None:
        raise QuantizeError("no")

    inputs = capture_inputs(tiny_base, batches)
    with pytest.raises(QuantizeError, match="no"):
        walk(tiny_base, inputs, fail)

    assert not any(m._forward_pre_hooks for m in tiny_base.model.modules())


@torch.no_grad()
def test_blocks_run_as_before_after_capturing(
    tiny_base: BaseModel, batches: list[Tensor]
) -> None:
    before = tiny_base.model(batches[0]).logits

    capture_inputs(tiny_base, batches)

    assert torch.equal(tiny_base.model(batches[0]).logits, before)


def test_blocks_called_with_positional_arguments_are_refused() -> None:
    block = nn.Linear(2, 2)
    base = SimpleNamespace(
        blocks=[block],
        model=SimpleNamespace(
            device=torch.device("cpu"),
            get_decoder=lambda: lambda tokens, use_cache: block(tokens, None),
        ),
    )

    with pytest.raises(QuantizeError, match="positional arguments"):
        capture_inputs(base, [torch.zeros(1, 2)])
    assert "forward" not in vars(block)
