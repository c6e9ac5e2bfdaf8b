"""The linear of clusters on an NVIDIA GPU, in Triton.

| tokens | way |
| --- | --- |
| up to 8 | `triton_cluster_gemv`: one launch |
| more | `triton_cluster_dequantize` into a workspace, then PyTorch's product |
"""

import torch
import triton
from torch import Tensor

from tacq_vllm.format.clustered import ClusteredLinear
from tacq_vllm.format.clusters import BLOCK_WORDS
from tacq_vllm.kernels.triton_cluster_codes import HALF, code_table
from tacq_vllm.kernels.triton_cluster_dequantize import cluster_dequantize_kernel
from tacq_vllm.kernels.triton_cluster_gemv import cluster_gemv_kernel
from tacq_vllm.kernels.triton_dense import DenseParts, dense_product
from tacq_vllm.kernels.triton_tuning import Tuning

MAX_GEMV_TOKENS = 8


def clusters_product(
    x: Tensor, linear: ClusteredLinear, bias: Tensor | None, tuning: Tuning
) -> Tensor:
    """Multiply x [tokens, in], contiguous, with the weight: [tokens, out]."""
    if x.shape[0] <= MAX_GEMV_TOKENS:
        return _gemv(x, linear, bias, tuning)
    return dense_product(x, clusters_dense(linear, x.dtype, tuning), bias)


def clusters_dense(
    linear: ClusteredLinear, dtype: torch.dtype, tuning: Tuning
) -> DenseParts:
    """The weight, dequantized to a type in parts."""
    tile = tuning.clusters_dequantize

    def dequantize(start: int, stop: int) -> Tensor:
        shape = stop - start, linear.in_features
        out = linear.qweight.new_empty(shape, dtype=dtype)
        cluster_dequantize_kernel[triton.cdiv(stop - start, tile.rows),](
            *_tensors(linear),
            out,
            start,
            stop,
            *_sizes(linear),
            ROWS=tile.rows,
            HALVES=tile.columns // HALF,
            ENTRIES=tile.entries,
            **tile.options,
        )
        return out

    return DenseParts(linear.out_features, linear.in_features, tile.rows, dequantize)


def clusters_token_counts(tuning: Tuning) -> tuple[int, ...]:
    """Numbers of tokens that between them need every kernel."""
    return (1, 2, 4, MAX_GEMV_TOKENS, MAX_GEMV_TOKENS + 1)


def _gemv(
    x: Tensor, linear: ClusteredLinear, bias: Tensor | None, tuning: Tuning
) -> Tensor:
    tile, tokens = tuning.clusters_gemv, x.shape[0]
    out = x.new_empty(tokens, linear.out_features)
    cluster_gemv_kernel[triton.cdiv(linear.out_features, tile.rows),](
        x,
        *_tensors(linear),
        bias,
        out,
        tokens,
        *_sizes(linear),
        HAS_BIAS=bias is not None,
        ROWS=tile.rows,
        TOKENS=triton.next_power_of_2(tokens),
        HALVES=tile.columns // HALF,
        ENTRIES=tile.entries,
        **tile.options,
    )
    return out


def _tensors(linear: ClusteredLinear) -> tuple[Tensor, ...]:
    """The stored tensors, and the table of codes."""
    table = code_table(linear.qweight.device)
    return linear.qweight, linear.scales, linear.outliers, table


def _sizes(linear: ClusteredLinear) -> tuple[int, ...]:
    """Rows, columns, words of a row, its groups, and half blocks of a group."""
    words, groups = linear.qweight.shape[1], linear.scales.shape[1]
    halves = words // BLOCK_WORDS * 2
    return linear.out_features, linear.in_features, words, groups, halves // groups
