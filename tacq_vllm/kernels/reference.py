"""Dequantization and the linear layer in plain PyTorch, on any device.

The truth for every other kernel: W = (code - zero) · scale, computed in float32,
plus the kept weights. The linear works on blocks of rows, so that no full dense
weight exists at once.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import linear as dense_linear

from tacq_vllm.format.linear import PackedLinear, unpack_outliers
from tacq_vllm.format.outliers import Outliers, slice_outlier_rows
from tacq_vllm.format.packing import unpack_codes

BLOCK_WEIGHTS = 1 << 18
"""Weights of a dequantized block: 1 MiB in float32, about a level-2 cache."""


def dequantize(linear: PackedLinear, dtype: torch.dtype = torch.float32) -> Tensor:
    """The dense weight [out, in], rounded once to `dtype`."""
    zeros = unpack_codes(linear.zero_planes, linear.bits, linear.out_features, dim=0)
    return _dequantize_rows(
        linear, zeros, unpack_outliers(linear), 0, linear.out_features, dtype
    )


def linear_forward(x: Tensor, linear: PackedLinear, bias: Tensor | None) -> Tensor:
    """Multiply x [..., in] with the weight: [..., out], in the type of x."""
    out = x.new_empty(*x.shape[:-1], linear.out_features)
    for start, stop, weight in _blocks(linear, x.dtype):
        out[..., start:stop] = dense_linear(x, weight)
    return out if bias is None else out + bias


def linear_backward(grad: Tensor, linear: PackedLinear) -> Tensor:
    """The gradient of x for that of the output, [..., out]: [..., in], in its type."""
    dtype = torch.promote_types(grad.dtype, torch.float32)
    total = grad.new_zeros(*grad.shape[:-1], linear.in_features, dtype=dtype)
    for start, stop, weight in _blocks(linear, grad.dtype):
        total += grad[..., start:stop] @ weight
    return total.to(grad.dtype)


def _blocks(
    linear: PackedLinear, dtype: torch.dtype
) -> Iterator[tuple[int, int, Tensor]]:
    """Blocks of rows: the first, the one after the last, and their dense weight."""
    rows = max(1, BLOCK_WEIGHTS // linear.in_features)
    zeros = unpack_codes(linear.zero_planes, linear.bits, linear.out_features, dim=0)
    outliers = unpack_outliers(linear)
    for start in range(0, linear.out_features, rows):
        stop = min(start + rows, linear.out_features)
        yield (
            start,
            stop,
            _dequantize_rows(linear, zeros, outliers, start, stop, dtype),
        )


def _dequantize_rows(
    linear: PackedLinear,
    zeros: Tensor,
    outliers: Outliers,
    start: int,
    stop: int,
    dtype: torch.dtype,
) -> Tensor:
    planes = tuple(plane[start:stop] for plane in linear.weight_planes)
    codes = unpack_codes(planes, linear.bits, linear.in_features)
    groups = linear.scales.shape[1]
    grouped = codes.view(stop - start, groups, -1).to(torch.float32)
    grouped -= zeros[start:stop].unsqueeze(-1)
    grouped *= linear.scales[start:stop].unsqueeze(-1)
    weight = grouped.flatten(1)
    kept = slice_outlier_rows(outliers, start, stop)
    weight.view(-1).index_add_(
        0,
        kept.rows * linear.in_features + kept.columns,
        kept.values.to(torch.float32),
    )
    return weight.to(dtype)
