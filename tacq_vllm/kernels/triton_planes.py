"""The linear of codes in planes on an NVIDIA GPU, in Triton.

| tokens | way |
| --- | --- |
| 1 | `triton_gemv`: one launch |
| up to `gemm_tokens` of the tuning table | `triton_gemm`: tensor cores |
| more | `triton_dequantize` into a workspace, then PyTorch's product |
"""

import torch
import triton
from torch import Tensor

from tacq_vllm.format.linear import PackedLinear
from tacq_vllm.format.packing import PLANE_WIDTHS, WORD_BITS
from tacq_vllm.kernels.triton_dense import DenseParts, dense_product
from tacq_vllm.kernels.triton_dequantize import dequantize_kernel
from tacq_vllm.kernels.triton_gemm import gemm_kernel
from tacq_vllm.kernels.triton_gemv import gemv_kernel
from tacq_vllm.kernels.triton_tuning import Tile, Tuning


def planes_product(
    x: Tensor, packed: PackedLinear, bias: Tensor | None, tuning: Tuning
) -> Tensor:
    """Multiply x [tokens, in], contiguous, with the weight: [tokens, out]."""
    if x.shape[0] == 1:
        return _gemv(x, packed, bias, tuning)
    if x.shape[0] <= tuning.gemm_tokens:
        return _gemm(x, packed, bias, tuning)
    return dense_product(x, planes_dense(packed, x.dtype, tuning), bias)


def planes_dense(
    packed: PackedLinear, dtype: torch.dtype, tuning: Tuning
) -> DenseParts:
    """The weight, dequantized to a type in parts."""

    def dequantize(start: int, stop: int) -> Tensor:
        return _dequantize(packed, dtype, start, stop, tuning)

    return DenseParts(
        packed.out_features, packed.in_features, tuning.dequantize.rows, dequantize
    )


def planes_token_counts(tuning: Tuning) -> tuple[int, ...]:
    """Numbers of tokens that between them need every kernel."""
    return (1, *(tile.tokens for tile in tuning.gemm), tuning.gemm_tokens + 1)


def _gemv(
    x: Tensor, packed: PackedLinear, bias: Tensor | None, tuning: Tuning
) -> Tensor:
    tile, words = tuning.gemv, _words(tuning.gemv, packed)
    out = x.new_empty(1, packed.out_features)
    gemv_kernel[triton.cdiv(packed.out_features, tile.rows),](
        x,
        *_planes(packed),
        bias,
        out,
        packed.out_features,
        packed.in_features,
        packed.qweight.shape[1],
        packed.scales.shape[1],
        1,
        GROUP_WORDS=_group_words(packed),
        BITS=packed.bits,
        EXACT=x.dtype == torch.float32,
        HAS_BIAS=bias is not None,
        ROWS=tile.rows,
        WORDS=words,
        ENTRIES=tile.entries,
        **tile.options,
    )
    return out


def _gemm(
    x: Tensor, packed: PackedLinear, bias: Tensor | None, tuning: Tuning
) -> Tensor:
    tile = next(tile for tile in tuning.gemm if x.shape[0] <= tile.tokens)
    tokens, num_words = x.shape[0], packed.qweight.shape[1]
    words = _words(tile, packed)
    grid = (
        triton.cdiv(packed.out_features, tile.rows),
        triton.cdiv(tokens, tile.tokens),
    )
    steps = triton.cdiv(num_words, words)
    splits = min(steps, max(1, tuning.programs // (grid[0] * grid[1])))
    out = x.new_empty(
        splits,
        tokens,
        packed.out_features,
        dtype=x.dtype if splits == 1 else torch.float32,
    )
    gemm_kernel[*grid, splits](
        x,
        *_planes(packed),
        bias,
        out,
        tokens,
        packed.out_features,
        packed.in_features,
        num_words,
        packed.scales.shape[1],
        triton.cdiv(steps, splits) * words,
        GROUP_WORDS=_group_words(packed),
        BITS=packed.bits,
        HAS_BIAS=bias is not None and splits == 1,
        ROWS=tile.rows,
        TOKENS=tile.tokens,
        WORDS=words,
        ENTRIES=tile.entries,
        PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
        **tile.options,
    )
    if splits == 1:
        return out[0]
    total = out.sum(0)
    return (total if bias is None else total + bias).to(x.dtype)


def _dequantize(
    packed: PackedLinear, dtype: torch.dtype, start: int, stop: int, tuning: Tuning
) -> Tensor:
    tile, words = tuning.dequantize, _words(tuning.dequantize, packed)
    out = packed.qweight.new_empty(stop - start, packed.in_features, dtype=dtype)
    dequantize_kernel[triton.cdiv(stop - start, tile.rows),](
        *_planes(packed),
        out,
        start,
        stop,
        packed.out_features,
        packed.in_features,
        packed.qweight.shape[1],
        packed.scales.shape[1],
        GROUP_WORDS=_group_words(packed),
        BITS=packed.bits,
        ROWS=tile.rows,
        WORDS=words,
        ENTRIES=tile.entries,
        **tile.options,
    )
    return out


def _planes(packed: PackedLinear) -> tuple[Tensor | None, ...]:
    return (
        packed.qweight,
        packed.qweight_high,
        packed.scales,
        packed.qzeros,
        packed.qzeros_high,
        packed.outliers,
    )


def _words(tile: Tile, packed: PackedLinear) -> int:
    """Words of the low plane that hold a tile's columns."""
    return tile.columns * PLANE_WIDTHS[packed.bits][0] // WORD_BITS


def _group_words(packed: PackedLinear) -> int:
    """Words of the low plane that share a scale."""
    groups = packed.scales.shape[1]
    return packed.qweight.shape[1] // groups
