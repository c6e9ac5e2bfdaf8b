"""Linears in training, and what they are packed into."""

import pytest
import torch
from torch import Tensor, nn

from tacq_vllm.format.linear import PackedLinear
from tacq_vllm.format.packing import unpack_codes
from tacq_vllm.format.stored import unpack_outliers
from tacq_vllm.kernels.reference import dequantize
from tacq_vllm.recover.config import RecoverConfig
from tacq_vllm.recover.linear import FrozenLinear, TrainedLinear
from tests.builders import random_linear
from tests.conftest import is_equal

OUT, IN, GROUP = 10, 96, 32


def make_packed(bits: int, density: float, dtype: torch.dtype) -> PackedLinear:
    return random_linear(bits, OUT, IN, GROUP, density, dtype, seed=bits)[0]


def make_linear(
    packed: PackedLinear, base: Tensor | None = None, **choices: object
) -> TrainedLinear:
    """A linear that starts as a packed one is."""
    linear = TrainedLinear(
        packed.out_features,
        packed.in_features,
        packed.scales.shape[1],
        unpack_outliers(packed).nnz,
        packed.bits,
        packed.scales.dtype,
        None,
        RecoverConfig(**choices),
    )
    base = dequantize(packed) if base is None else base
    linear.load(packed, base, margin=0.25, generator=torch.Generator().manual_seed(0))
    return linear


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("density", [0.0, 0.05])
def test_it_starts_as_the_checkpoint_whatever_the_base(
    bits: int, density: float, dtype: torch.dtype, monkeypatch
):
    # Several parts, the last one smaller.
    monkeypatch.setattr("tacq_vllm.recover.linear._START_WEIGHTS", 3 * IN)
    packed = make_packed(bits, density, dtype)
    base = dequantize(packed) + 0.2 * torch.randn(OUT, IN)
    linear = make_linear(packed, base, train_outliers=True)
    x = torch.randn(3, IN)

    # Codes at kept weights are random in it, and zero-points in ours.
    stored = dequantize(packed)
    kept = linear.kept_at
    stored.view(-1)[kept] = stored.view(-1)[kept].to(dtype).float()

    torch.testing.assert_close(linear(x), x @ stored.T)
    again = linear.pack()
    assert torch.equal(dequantize(again), stored)
    assert torch.equal(again.scales, packed.scales)
    assert torch.equal(again.qzeros, packed.qzeros)
    assert is_equal(make_linear(again).pack().tensors(), again.tensors())


@pytest.mark.parametrize("train_outliers", [False, True])
@pytest.mark.parametrize("train", ["magnitude", "lora", "both"])
def test_folding_is_exact(train: str, train_outliers: bool):
    packed = make_packed(3, 0.05, torch.bfloat16)
    linear = make_linear(packed, train=train, train_outliers=train_outliers)
    optimizer = torch.optim.Adam(linear.parameters(), lr=0.05)
    target = torch.randn(64, OUT)
    x = torch.randn(64, IN)
    for _ in range(5):
        optimizer.zero_grad()
        (linear(x) - target).square().sum().backward()
        optimizer.step()

    again, start = linear.pack(), make_linear(packed).pack()

    # The very weights, which a product with 1 shows.
    assert torch.equal(linear(torch.eye(IN)).T, dequantize(again))
    assert torch.equal(again.scales, start.scales) == (train == "lora")
    assert torch.equal(again.qweight, start.qweight) == (train == "magnitude")
    assert torch.equal(again.outliers, start.outliers) != train_outliers
    assert torch.equal(again.qzeros, start.qzeros)


def test_kept_weights_are_not_trained_where_there_are_none():
    linear = make_linear(make_packed(2, 0.0, torch.bfloat16), train_outliers=True)

    assert {name for name, _ in linear.named_parameters()} == {"magnitude", "A", "B"}


def test_the_update_is_in_mean_scales():
    """Weights and scales twice as large: the same learning rate moves codes alike."""
    packed = make_packed(3, 0.0, torch.bfloat16)
    doubled = PackedLinear.from_tensors(
        packed.tensors() | {"scales": packed.scales * 2}, 3, IN
    )
    small, large = make_linear(packed), make_linear(doubled)
    with torch.no_grad():
        for linear in (small, large):
            linear.B.normal_(generator=torch.Generator().manual_seed(1))

    assert torch.equal(small.pack().qweight, large.pack().qweight)
    assert not torch.equal(small.pack().qweight, make_linear(packed).pack().qweight)


def test_the_update_is_alpha_over_rank_mean_scales():
    packed = make_packed(3, 0.0, torch.bfloat16)
    # Others' checkpoints may have scales of either sign.
    packed.scales[::2] *= -1
    linear = make_linear(packed, rank=2, alpha=3.0)
    with torch.no_grad():
        linear.B.normal_(generator=torch.Generator().manual_seed(1))

    codes = unpack_codes(linear.pack().weight_planes, 3, IN)

    size = packed.scales.abs().float().mean()
    latent = linear.latent.float() + 3.0 / 2 * size * (linear.B @ linear.A)
    scales = packed.scales.float().repeat_interleave(GROUP, dim=1)
    zeros = packed.zeros.repeat_interleave(GROUP, dim=1)
    expected = (latent / scales + zeros).round().clamp(0, 7)
    assert torch.equal(codes.float(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_frozen_linear_is_one_of_torch(dtype: torch.dtype, monkeypatch):
    # Several blocks, the last one smaller.
    monkeypatch.setattr("tacq_vllm.recover.linear._BLOCK_WEIGHTS", 3 * IN)
    dense = nn.Linear(IN, OUT).to(torch.bfloat16).requires_grad_(False)
    x = torch.randn(2, 3, IN).to(dtype).requires_grad_()
    weights = torch.randn(2, 3, OUT).to(dtype)
    expected_x = x.detach().clone().requires_grad_()

    (FrozenLinear(dense)(x) * weights).sum().backward()
    (dense.to(dtype)(expected_x) * weights).sum().backward()

    # Sums are in float32: of bfloat16, they are the better ones.
    torch.testing.assert_close(x.grad, expected_x.grad, rtol=2e-2, atol=2e-3)
