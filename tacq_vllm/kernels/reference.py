"""Dequantization and the linear layer in plain PyTorch, on any device.

The truth for every other kernel: W = (code - zero) · scale, computed in float32,
plus the kept weights. The linear works on blocks of rows, so that no full dense
weight exists at once.
"""

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
    rows = max(1, BLOCK_WEIGHTS // linear.in_features)
    zeros = unpack_codes(linear.zero_planes, linear.bits, linear.out_features, dim=0)
    outliers = unpack_outliers(linear)
    out = x.new_empty(*x.shape[:-1], linear.out_features)
    for start in range(0, linear.out_features, rows):
        stop = min(start + rows, linear.out_features)
        weight = _dequantize_rows(linear, zeros, outliers, start, stop, x.dtype)
        out[..., start:stop] = dense_linear(x, weight)
    return out if bias is None else out + bias


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
