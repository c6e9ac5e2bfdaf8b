"""The linear of a tiled weight on an NVIDIA GPU, in Triton.

| tokens | way |
| --- | --- |
| up to `tile_tokens` of the tuning table | `triton_tile_gemm`: tensor cores |
| more | `triton_tile_dequantize` into a workspace, then PyTorch's product |
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tacq_vllm.kernels.tiles import BLOCK_WORDS, SEGMENT, TiledLinear, block_columns
from tacq_vllm.kernels.triton_dense import dense_product
from tacq_vllm.kernels.triton_tile_dequantize import (
    add_segments_kernel,
    tile_dequantize_kernel,
)
from tacq_vllm.kernels.triton_tile_gemm import tile_gemm_kernel
from tacq_vllm.kernels.triton_tuning import Tuning

_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def tiles_product(
    x: Tensor, tiled: TiledLinear, bias: Tensor | None, tuning: Tuning
) -> Tensor:
    """Multiply x [tokens, in], contiguous, 16 bits, with the weight: [tokens, out]."""
    if x.shape[0] <= tuning.tile_tokens:
        return _gemm(x, tiled, bias, tuning)

    def dequantize(start: int, stop: int) -> Tensor:
        return _dequantize(tiled, x.dtype, start, stop, tuning)

    rows = tuning.tile_dequantize.rows
    return dense_product(x, bias, tiled.out_features, rows, dequantize)


def tiles_token_counts(tuning: Tuning) -> tuple[int, ...]:
    """Numbers of tokens that between them need every kernel."""
    return (*(tile.tokens for tile in tuning.tile_gemm), tuning.tile_tokens + 1)


def _gemm(x: Tensor, tiled: TiledLinear, bias: Tensor | None, tuning: Tuning) -> Tensor:
    tokens, out_features = x.shape[0], tiled.out_features
    shape = next(tile for tile in tuning.tile_gemm if tokens <= tile.tokens)
    row_blocks = triton.cdiv(out_features, shape.rows)
    blocks = tiled.in_features // block_columns(tiled.bits)
    splits = min(blocks, triton.cdiv(shape.programs, row_blocks))
    split_blocks = triton.cdiv(blocks, splits)
    splits = triton.cdiv(blocks, split_blocks)
    out = x.new_empty(tokens, out_features)
    sums = None
    if splits > 1:
        sums = x.new_empty(splits, tokens, out_features, dtype=torch.float32)
    tile_gemm_kernel[row_blocks, splits](
        x,
        *_codes(tiled),
        tiled.segment_starts,
        tiled.segments,
        tiled.counters,
        bias,
        sums,
        out,
        tokens,
        out_features,
        tiled.in_features,
        split_blocks,
        GROUP_SIZE=_group_size(tiled),
        BITS=tiled.bits,
        HAS_BIAS=bias is not None,
        IS_SPLIT=splits > 1,
        BLOCK_WORDS=BLOCK_WORDS,
        ROWS=shape.rows,
        TOKENS=shape.tokens,
        SEGMENTS=shape.segments,
        SEGMENT=SEGMENT,
        DTYPE=_DTYPES[tiled.dtype],
        num_warps=shape.warps,
        num_stages=shape.stages,
        maxnreg=shape.registers,
    )
    return out


def _dequantize(
    tiled: TiledLinear, dtype: torch.dtype, start: int, stop: int, tuning: Tuning
) -> Tensor:
    shape = tuning.tile_dequantize
    out = tiled.qweight.new_empty(stop - start, tiled.in_features, dtype=dtype)
    blocks = triton.cdiv(stop - start, shape.rows)
    tile_dequantize_kernel[blocks, tiled.in_features // block_columns(tiled.bits)](
        *_codes(tiled),
        out,
        start,
        stop,
        tiled.out_features,
        tiled.in_features,
        GROUP_SIZE=_group_size(tiled),
        BITS=tiled.bits,
        BLOCK_WORDS=BLOCK_WORDS,
        ROWS=shape.rows,
        DTYPE=_DTYPES[tiled.dtype],
        num_warps=shape.warps,
    )
    add_segments_kernel[blocks, shape.sharers](
        tiled.segment_starts,
        tiled.segments,
        out,
        start,
        stop,
        tiled.out_features,
        tiled.in_features,
        ROWS=shape.rows,
        SEGMENTS=shape.segments,
        SEGMENT=SEGMENT,
        DTYPE=_DTYPES[tiled.dtype],
        num_warps=shape.warps,
    )
    return out


def _codes(tiled: TiledLinear) -> tuple[Tensor | None, ...]:
    return tiled.qweight, tiled.qweight_high, tiled.grid


def _group_size(tiled: TiledLinear) -> int:
    """Columns of a group; 0 where groups are whole rows."""
    return 0 if tiled.grid.shape[0] == 1 else tiled.group_size
