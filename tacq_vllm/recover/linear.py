"""The linears of a model in training: quantized ones, and those left in 16 bits."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear as dense_linear

from tacq_vllm.format.linear import PackedLinear, pack_linear
from tacq_vllm.format.outliers import select_outliers
from tacq_vllm.format.packing import unpack_codes
from tacq_vllm.format.stored import unpack_outliers
from tacq_vllm.recover.config import RecoverConfig
from tacq_vllm.recover.quantizer import (
    Frozen,
    Lattice,
    Trained,
    straight_through_linear,
)

_BLOCK_WEIGHTS = 1 << 22
"""Weights of a frozen linear that are in float32 at a time: 16 MiB."""


_START_WEIGHTS = 1 << 19
"""Weights whose start is worked out at a time: 2 MiB, some ten times over."""


class TrainedLinear(nn.Module):
    """A linear whose weight is quantized in every forward pass.

    Args:
        out_features: rows of the weight.
        in_features: its columns.
        groups: groups of columns that share a scale.
        outliers: number of its weights kept in 16 bits.
        bits: bits of a code.
        dtype: the 16-bit type of the checkpoint.
        bias: an unquantized bias [out], or None.
        config: what is trained.
    """

    latent: Tensor
    scales: Tensor
    zeros: Tensor
    kept_at: Tensor
    kept: Tensor

    def __init__(
        self,
        out_features: int,
        in_features: int,
        groups: int,
        outliers: int,
        bits: int,
        dtype: torch.dtype,
        bias: nn.Parameter | None,
        config: RecoverConfig,
    ) -> None:
        super().__init__()
        shape = (out_features, groups)
        self.bits = bits
        self.alpha = config.alpha
        self.bias = bias
        self.register_buffer("latent", torch.empty(out_features, in_features).to(dtype))
        self.register_buffer("scales", torch.empty(shape, dtype=dtype))
        self.register_buffer("zeros", torch.empty(shape, dtype=torch.uint8))
        self.register_buffer("kept_at", torch.empty(outliers, dtype=torch.int64))
        self.magnitude = self.A = self.B = None
        if config.trains_magnitude:
            self.magnitude = nn.Parameter(torch.empty(shape))
        if config.trains_lora:
            self.A = nn.Parameter(torch.empty(config.rank, in_features))
            self.B = nn.Parameter(torch.empty(out_features, config.rank))
        if config.train_outliers and outliers:
            self.kept = nn.Parameter(torch.empty(outliers))
        else:
            self.register_buffer("kept", torch.empty(outliers, dtype=dtype))
        self._factor = 0.0

    @torch.no_grad()
    def load(
        self,
        packed: PackedLinear,
        base: Tensor,
        margin: float,
        generator: torch.Generator,
    ) -> None:
        """Start as the checkpoint is.

        Args:
            packed: its tensors.
            base: float32 [out, in], the weight that was quantized.
            margin: share of a step between the latent weights and the next code.
            generator: of A's first values.
        """
        outliers = unpack_outliers(packed)
        self.kept_at.copy_(outliers.rows * packed.in_features + outliers.columns)
        self.scales.copy_(packed.scales)
        self.zeros.copy_(packed.zeros)
        codes = unpack_codes(packed.weight_planes, self.bits, packed.in_features)
        step = max(1, _START_WEIGHTS // packed.in_features)
        for start in range(0, packed.out_features, step):
            part = slice(start, start + step)
            rows = self._lattice.rows(part)
            self.latent[part] = rows.confine(base[part], codes[part], margin)
        # What the code stands for is added: 0, but in others' checkpoints.
        self.kept.copy_(outliers.values + self._lattice.values_at_kept(codes))
        if self.magnitude is not None:
            self.magnitude.fill_(1.0)
        if self.A is not None and self.B is not None:
            self.A.normal_(generator=generator)
            self.B.zero_()
            scale = float(self.scales.abs().float().mean())
            self._factor = self.alpha / self.A.shape[0] * scale

    @property
    def _lattice(self) -> Lattice:
        return Lattice(self.scales, self.zeros, self.kept_at, 2**self.bits - 1)

    @property
    def _frozen(self) -> Frozen:
        return Frozen(self.latent, self._lattice, self._factor)

    @property
    def _trained(self) -> Trained:
        return Trained(self.magnitude, self.A, self.B, self.kept)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply x [..., in] with the quantized weight: [..., out]."""
        out = straight_through_linear(_computed(x), self._frozen, self._trained)
        return out if self.bias is None else out + self.bias.to(out.dtype)

    @torch.no_grad()
    def pack(self) -> PackedLinear:
        """What was trained, folded into codes, scales and kept weights."""
        frozen, trained, lattice = self._frozen, self._trained, self._lattice
        levels = lattice.levels(frozen.codes(trained))
        codes = (levels + lattice.zeros.unsqueeze(-1)).to(torch.uint8).flatten(1)
        mask = torch.zeros_like(codes, dtype=torch.bool)
        mask.view(-1)[lattice.kept] = True
        weight = frozen.dense(levels, trained).to(self.latent.dtype)
        return pack_linear(
            codes,
            self.zeros,
            lattice.fold(trained.magnitude),
            select_outliers(weight, mask),
            self.bits,
        )


class FrozenLinear(nn.Module):
    """A linear that stays in 16 bits, in memory too; products are in x's type."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = linear.weight
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """Multiply x [..., in] with the weight: [..., out]."""
        out: Tensor = _FrozenProduct.apply(_computed(x), self.weight)  # type: ignore[no-untyped-call]
        return out if self.bias is None else out + self.bias.to(out.dtype)


class _FrozenProduct(torch.autograd.Function):
    """Blocks of rows are converted when they are multiplied, forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        parts = [dense_linear(x, rows.to(x.dtype)) for rows in _row_blocks(weight)]
        return torch.cat(parts, dim=-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        total = grad.new_zeros(*grad.shape[:-1], weight.shape[1], dtype=torch.float32)
        start = 0
        for rows in _row_blocks(weight):
            part = grad[..., start : start + rows.shape[0]]
            total += part @ rows.to(grad.dtype)
            start += rows.shape[0]
        return total.to(grad.dtype), None


def _row_blocks(weight: Tensor) -> tuple[Tensor, ...]:
    blocks: tuple[Tensor, ...] = weight.split(_BLOCK_WEIGHTS // weight.shape[1] or 1)
    return blocks


def _computed(x: Tensor) -> Tensor:
    """Convert x to the type of products, as `torch.nn.functional.linear` would."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        return x.to(torch.get_autocast_dtype(kind))
    return x
