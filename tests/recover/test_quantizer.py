"""The quantizer, and its gradients against those of plain autograd."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tacq_vllm.recover.quantizer import (
    MIN_MAGNITUDE,
    Frozen,
    Lattice,
    Trained,
    straight_through_linear,
)

OUT, GROUPS, SIZE, RANK, MAX_CODE = 6, 3, 16, 2, 7
IN = GROUPS * SIZE


class RoundThrough(torch.autograd.Function):
    """Rounding whose gradient is that of doing nothing."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad


class ClipThrough(torch.autograd.Function):
    """Clipping to codes, which does nothing to the first and the last one either.

    What `Tensor.clamp` hands on at its bounds depends on the version of PyTorch.
    """

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        clipped = x.clamp(0, MAX_CODE)
        ctx.save_for_backward(clipped == x)
        return clipped

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (inside,) = ctx.saved_tensors
        return grad * inside


class CastThrough(torch.autograd.Function):
    """Rounding to bfloat16 likewise."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.bfloat16().float()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad


def make_frozen(seed: int = 0) -> Frozen:
    generator = torch.Generator().manual_seed(seed)
    scales = torch.rand(OUT, GROUPS, generator=generator) * 0.1 + 0.05
    # Zero-points at the ends of the grid too, so that latent weights are clipped.
    zeros = torch.randint(MAX_CODE + 1, (OUT, GROUPS), generator=generator)
    kept = torch.randperm(OUT * IN, generator=generator)[:9].sort().values
    lattice = Lattice(scales.bfloat16(), zeros.to(torch.uint8), kept, MAX_CODE)
    latent = torch.randn(OUT, IN, generator=generator) * 0.3
    return Frozen(latent.bfloat16(), lattice, factor=0.07)


def make_trained(seed: int = 1) -> Trained:
    generator = torch.Generator().manual_seed(seed)

    def values(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    magnitude = 1 + 0.1 * values(OUT, GROUPS)
    trained = Trained(magnitude, values(RANK, IN), values(OUT, RANK), values(9))
    return Trained(*(tensor.requires_grad_() for tensor in trained))


def plain_weight(frozen: Frozen, trained: Trained) -> Tensor:
    """The formula as it stands, in the hands of autograd."""
    lattice = frozen.lattice
    scales = lattice.scales.float().repeat_interleave(SIZE, dim=1)
    zeros = lattice.zeros.float().repeat_interleave(SIZE, dim=1)
    latent = frozen.latent.float() + frozen.factor * trained.B @ trained.A
    codes = RoundThrough.apply(latent / scales + zeros)
    codes = ClipThrough.apply(codes)
    folded = CastThrough.apply(trained.magnitude * lattice.scales.float())
    weight = (codes - zeros) * folded.repeat_interleave(SIZE, dim=1)
    return (
        weight.flatten()
        .index_put((lattice.kept,), CastThrough.apply(trained.kept))
        .view(OUT, IN)
    )


@pytest.mark.parametrize("left_out", [(), ("magnitude",), ("A", "B"), ("kept",)])
def test_products_and_gradients_are_those_of_the_formula(left_out):
    frozen, trained = make_frozen(), make_trained()
    whole = trained
    if "magnitude" in left_out:
        trained = trained._replace(magnitude=None)
        whole = whole._replace(magnitude=torch.ones(OUT, GROUPS))
    if "A" in left_out:
        trained = trained._replace(A=None, B=None)
        whole = whole._replace(A=torch.zeros(RANK, IN), B=torch.zeros(OUT, RANK))
    if "kept" in left_out:
        trained = trained._replace(kept=trained.kept.detach().bfloat16())
        whole = whole._replace(kept=trained.kept.float())
    x = torch.randn(5, 2, IN, requires_grad=True)
    tensors = [t for t in (x, *trained) if t is not None and t.requires_grad]
    weights = torch.randn(5, 2, OUT)

    out = straight_through_linear(x, frozen, trained)
    expected = x @ plain_weight(frozen, whole).T

    torch.testing.assert_close(out, expected)
    found = torch.autograd.grad((out * weights).sum(), tensors)
    wanted = torch.autograd.grad((expected * weights).sum(), tensors)
    for gradient, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-5)
        assert bool(other.any())


def test_nothing_but_inputs_is_remembered_for_the_backward_pass():
    frozen, trained = make_frozen(), make_trained()
    x = torch.randn(2, IN, requires_grad=True)
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        straight_through_linear(x, frozen, trained)

    assert {t.data_ptr() for t in saved} == {t.data_ptr() for t in (x, *trained)}


def test_products_in_bfloat16():
    frozen, trained = make_frozen(), make_trained()
    x = torch.randn(4, IN, dtype=torch.bfloat16, requires_grad=True)

    out = straight_through_linear(x, frozen, trained)
    out.float().sum().backward()

    assert out.dtype == x.grad.dtype == torch.bfloat16
    exact = x.float() @ frozen.weight(trained).T
    torch.testing.assert_close(out.float(), exact, rtol=2e-2, atol=2e-2)
    assert all(tensor.grad.dtype == torch.float32 for tensor in trained)


@given(seed=st.integers(0, 50), bits=st.integers(2, 4), margin=st.floats(0.0625, 0.5))
def test_confined_weights_have_their_codes(seed: int, bits: int, margin: float):
    generator = torch.Generator().manual_seed(seed)
    frozen = make_frozen(seed)
    zeros = frozen.lattice.zeros.clamp(max=2**bits - 1)
    lattice = Lattice(frozen.lattice.scales, zeros, frozen.lattice.kept, 2**bits - 1)
    codes = torch.randint(2**bits, (OUT, IN), generator=generator).to(torch.uint8)
    weight = torch.randn(OUT, IN, generator=generator)

    latent = lattice.confine(weight, codes, margin)

    # Also as they are stored.
    for stored in (latent, latent.bfloat16().float(), latent.half().float()):
        found = lattice.round(stored.clone()).clamp(0, 2**bits - 1)
        assert torch.equal(found.flatten(1), codes.float())
    if margin == 0.5:
        inner = (codes > 0) & (codes < 2**bits - 1)
        centers = lattice.grouped(codes.float()) - zeros.unsqueeze(-1)
        centers = (centers * lattice.steps()).flatten(1)
        torch.testing.assert_close(latent[inner], centers[inner])


def test_weights_within_their_cells_stay():
    frozen = make_frozen()
    lattice = frozen.lattice
    levels = torch.randint(-3, 4, (OUT, GROUPS, SIZE)) + 0.2
    weight = (levels * lattice.steps()).flatten(1)
    codes = lattice.round(weight.clone()).clamp(0, MAX_CODE).to(torch.uint8).flatten(1)

    confined = lattice.confine(weight, codes, margin=0.25)

    torch.testing.assert_close(confined, weight)


def test_magnitudes_keep_scales_from_vanishing():
    lattice = make_frozen().lattice
    magnitude = torch.full((OUT, GROUPS), -3.0)

    folded = lattice.fold(magnitude).float()

    torch.testing.assert_close(folded, lattice.scales.float() * MIN_MAGNITUDE)


def test_a_scale_of_zero_stands_for_zeros():
    frozen, trained = make_frozen(), make_trained()
    scales = frozen.lattice.scales.clone()
    scales[0] = 0.0
    lattice = Lattice(scales, frozen.lattice.zeros, torch.tensor([IN]), MAX_CODE)
    frozen = Frozen(frozen.latent, lattice, frozen.factor)
    trained = trained._replace(kept=torch.ones(1))

    weight = frozen.weight(trained)
    again, gradients = frozen.gradients(torch.ones(OUT, IN), trained)
    codes = torch.zeros(OUT, IN, dtype=torch.uint8)

    assert not weight[0].any()
    assert weight[1, 0] == 1.0
    assert torch.equal(again, weight)
    assert all(bool(gradient.isfinite().all()) for gradient in gradients[:3])
    assert bool(lattice.confine(weight, codes, margin=0.25).isfinite().all())
