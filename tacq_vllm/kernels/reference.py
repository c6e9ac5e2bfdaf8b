"""Dequantization and the linear layer in plain PyTorch, on any device.

The truth for every other kernel: W = step · scale, computed in float32, plus the kept
weights. The linear works on blocks of rows, so that no full dense weight exists at
once.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import linear as dense_linear

from tacq_vllm.format.outliers import Outliers, slice_outlier_rows
from tacq_vllm.format.stored import StoredLinear, unpack_outliers

BLOCK_WEIGHTS = 1 << 18
"""Weights of a dequantized block: 1 MiB in float32, about a level-2 cache."""


def dequantize(linear: StoredLinear, dtype: torch.dtype = torch.float32) -> Tensor:
    """The dense weight [out, in], rounded once to `dtype`."""
    outliers = unpack_outliers(linear)
    return _dequantize_rows(linear, outliers, 0, linear.out_features, dtype)


def linear_forward(x: Tensor, linear: StoredLinear, bias: Tensor | None) -> Tensor:
    """Multiply x [..., in] with the weight: [..., out], in the type of x."""
    out = x.new_empty(*x.shape[:-1], linear.out_features)
    for start, stop, weight in _blocks(linear, x.dtype):
        out[..., start:stop] = dense_linear(x, weight)
    return out if bias is None else out + bias


def linear_backward(grad: Tensor, linear: StoredLinear) -> Tensor:
    """The gradient of x for that of the output, [..., out]: [..., in], in its type."""
    dtype = torch.promote_types(grad.dtype, torch.float32)
    total = grad.new_zeros(*grad.shape[:-1], linear.in_features, dtype=dtype)
    for start, stop, weight in _blocks(linear, grad.dtype):
        total += grad[..., start:stop] @ weight
    return total.to(grad.dtype)


def _blocks(
    linear: StoredLinear, dtype: torch.dtype
) -> Iterator[tuple[int, int, Tensor]]:
    """Blocks of rows: the first, the one after the last, and their dense weight."""
    rows = max(1, BLOCK_WEIGHTS // linear.in_features)
    outliers = unpack_outliers(linear)
    for start in range(0, linear.out_features, rows):
        stop = min(start + rows, linear.out_features)
        yield start, stop, _dequantize_rows(linear, outliers, start, stop, dtype)


def _dequantize_rows(
    linear: StoredLinear, outliers: Outliers, start: int, stop: int, dtype: torch.dtype
) -> Tensor:
    weight = linear.steps(start, stop)
    grouped = weight.view(stop - start, linear.scales.shape[1], -1)
    grouped *= linear.scales[start:stop].unsqueeze(-1)
    kept = slice_outlier_rows(outliers, start, stop)
    weight.view(-1).index_add_(
        0,
        kept.rows * linear.in_features + kept.columns,
        kept.values.to(torch.float32),
    )
    return weight.to(dtype)
