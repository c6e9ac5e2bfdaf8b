"""The quantizer that is trained through, and its gradients (DL-QAT, section 3).

    V = latent + B·A · factor
    W = m · s · (clip(round(V / s + z), 0, max) - z), and the kept weights

Rounding hands the gradient on as if it were not there, clipping only where it does
nothing. What the checkpoint stores, m · s in 16 bits, is what the forward pass uses.
A weight is made when it is needed, and again for the backward pass: there is never more
than one in float32.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear as dense_linear

MIN_MAGNITUDE = 1 / 16
"""A group's scale keeps at least this share of what it was, and its sign."""


@dataclass(frozen=True)
class Lattice:
    """The values that the groups of a linear [out, in] can take; it is not trained."""

    scales: Tensor
    """16-bit [out, groups]."""
    zeros: Tensor
    """uint8 [out, groups]."""
    kept: Tensor
    """int64 [nnz]: where, in the flat weight, a value is kept in 16 bits."""
    max_code: int

    def steps(self) -> Tensor:
        """Width of a step: float32 [out, groups, 1], never zero."""
        scales = self.scales.to(torch.float32).unsqueeze(-1)
        return torch.where(scales == 0, 1.0, scales)

    def grouped(self, weight: Tensor) -> Tensor:
        """View [out, in] as [out, groups, group size]."""
        return weight.view(*self.scales.shape, -1)

    def rows(self, part: slice) -> "Lattice":
        """The lattice of some rows, without kept weights."""
        nothing = self.kept[:0]
        return Lattice(self.scales[part], self.zeros[part], nothing, self.max_code)

    def values_at_kept(self, codes: Tensor) -> Tensor:
        """What codes, uint8 [out, in], stand for where weights are kept: [nnz]."""
        size = codes.shape[1] // self.scales.shape[1]
        group = self.kept // size
        steps = codes.view(-1)[self.kept].float() - self.zeros.view(-1)[group]
        return steps * self.scales.view(-1)[group]

    def confine(self, weight: Tensor, codes: Tensor, margin: float) -> Tensor:
        """Move weights into the cells of their codes: float32 [out, in].

        Args:
            weight: float32 [out, in].
            codes: uint8 [out, in].
            margin: how far from the next code, in steps; 0.5 is the middle.
        """
        steps, zeros = self.steps(), self.zeros.unsqueeze(-1)
        codes = self.grouped(codes)
        offset = self.grouped(weight) / steps + zeros - codes
        # Beyond the first and the last code there is no other.
        low = torch.where(codes == 0, -torch.inf, margin - 0.5)
        high = torch.where(codes == self.max_code, torch.inf, 0.5 - margin)
        return ((offset.clamp(low, high) + codes - zeros) * steps).flatten(1)

    def round(self, position: Tensor) -> Tensor:
        """Unclipped codes of latent weights, in place: float32 [out, groups, size]."""
        position = self.grouped(position)
        return position.div_(self.steps()).add_(self.zeros.unsqueeze(-1)).round_()

    def levels(self, codes: Tensor) -> Tensor:
        """Clip codes [out, groups, size], less zero-points, in place; 0 where kept."""
        codes.clamp_(0, self.max_code).sub_(self.zeros.unsqueeze(-1))
        codes.view(-1)[self.kept] = 0.0
        return codes

    def fold(self, magnitude: Tensor | None) -> Tensor:
        """The scales that the checkpoint stores: 16-bit [out, groups]."""
        if magnitude is None:
            return self.scales
        magnitude = magnitude.clamp(min=MIN_MAGNITUDE)
        return (magnitude * self.scales).to(self.scales.dtype)


class Trained(NamedTuple):
    """What may be trained of a linear; None: it stays as it is."""

    magnitude: Tensor | None
    """float32 [out, groups]."""
    A: Tensor | None
    """float32 [rank, in]."""
    B: Tensor | None
    """float32 [out, rank]."""
    kept: Tensor
    """[nnz]: float32 if it is trained, otherwise of 16 bits."""


@dataclass(frozen=True)
class Frozen:
    """What is not trained of a linear."""

    latent: Tensor
    """16-bit [out, in]."""
    lattice: Lattice
    factor: float
    """Of B·A."""

    def codes(self, trained: Trained) -> Tensor:
        """Unclipped codes: float32 [out, groups, size]."""
        latent = self.latent.to(torch.float32, copy=True)
        if trained.A is not None and trained.B is not None:
            latent.addmm_(trained.B, trained.A, alpha=self.factor)
        return self.lattice.round(latent)

    def dense(self, levels: Tensor, trained: Trained) -> Tensor:
        """The weight that levels stand for: float32 [out, in]; `levels` is spent."""
        scales = self.lattice.fold(trained.magnitude).to(torch.float32)
        weight = levels.mul_(scales.unsqueeze(-1)).flatten(1)
        stored = trained.kept.to(self.latent.dtype)
        weight.view(-1)[self.lattice.kept] = stored.to(torch.float32)
        return weight

    def weight(self, trained: Trained) -> Tensor:
        """What the checkpoint's tensors will stand for: float32 [out, in]."""
        return self.dense(self.lattice.levels(self.codes(trained)), trained)

    def gradients(self, G: Tensor, trained: Trained) -> tuple[Tensor, list[Any]]:
        """The weight once more, and the gradients of what made it.

        Args:
            G: float32 [out, in], the gradient of the weight; it is spent.
            trained: what made it.

        Returns:
            The weight, float32 [out, in]; the gradients in the order of `Trained`.
        """
        lattice = self.lattice
        codes = self.codes(trained)
        inside = (codes >= 0) & (codes <= lattice.max_code)
        levels = lattice.levels(codes)
        G_kept = G.view(-1)[lattice.kept] if trained.kept.requires_grad else None
        # A kept weight depends on nothing else.
        G.view(-1)[lattice.kept] = 0.0
        grouped = lattice.grouped(G)
        G_magnitude = G_A = G_B = None
        if trained.magnitude is not None:
            G_magnitude = (grouped * levels).sum(-1).mul_(lattice.scales)
        if trained.A is not None and trained.B is not None:
            slope = lattice.fold(trained.magnitude).unsqueeze(-1) / lattice.steps()
            G_latent = grouped.mul_(inside).mul_(slope).flatten(1)
            G_B = self.factor * (G_latent @ trained.A.T)
            G_A = self.factor * (trained.B.T @ G_latent)
        weight = self.dense(levels, trained)
        return weight, [G_magnitude, G_A, G_B, G_kept]


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, frozen: Frozen, *trained: Any) -> Tensor:
        ctx.save_for_backward(x, *trained)
        ctx.frozen = frozen
        return dense_linear(x, frozen.weight(Trained(*trained)).to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, *tensors = ctx.saved_tensors
        G = grad.flatten(0, -2).T @ x.flatten(0, -2)
        frozen: Frozen = ctx.frozen
        weight, gradients = frozen.gradients(G.float(), Trained(*tensors))
        grad_x = grad @ weight.to(grad.dtype) if ctx.needs_input_grad[0] else None
        return grad_x, None, *gradients


def straight_through_linear(x: Tensor, frozen: Frozen, trained: Trained) -> Tensor:
    """Multiply x [..., in] with the quantized weight: [..., out], in the type of x.

    Gradients go straight through the rounding, to x and to what is trained.
    """
    product: Tensor = _Product.apply(x, frozen, *trained)  # type: ignore[no-untyped-call]
    return product
