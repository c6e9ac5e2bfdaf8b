"""The linear of a tiled weight on an NVIDIA GPU, in Triton.

| tokens | way |
| --- | --- |
| up to two of the largest tiles | `triton_tile_gemm`: tensor cores |
| more | `triton_tile_dequantize` into a workspace, then PyTorch's product |
"""

import functools

import torch
import triton
import triton.language as tl
from packaging.version import Version
from torch import Tensor

from tacq_vllm.kernels.tiles import (
    BLOCK_WORDS,
    JOB_SEGMENTS,
    OWN_SEGMENTS,
    ROWS,
    SEGMENT,
    TOKEN_BLOCKS,
    TiledLinear,
    block_columns,
)
from tacq_vllm.kernels.triton_dense import DenseParts, dense_product
from tacq_vllm.kernels.triton_early import can_be_early
from tacq_vllm.kernels.triton_tile_codes import offset_words
from tacq_vllm.kernels.triton_tile_dequantize import (
    add_kept_kernel,
    tile_dequantize_kernel,
)
from tacq_vllm.kernels.triton_tile_gemm import tile_gemm_kernel
from tacq_vllm.kernels.triton_tuning import Tuning

OPERAND_WIDTH = 2 if Version(triton.__version__) >= Version("3.8") else 4
"""Columns of an operand that Triton gives a thread before the next thread's begin.

Another number gives the same products; but then operands are exchanged between threads.
"""

_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def tiles_product(
    x: Tensor, tiled: TiledLinear, bias: Tensor | None, tuning: Tuning
) -> Tensor:
    """Multiply x [tokens, in], contiguous, 16 bits, with the weight: [tokens, out]."""
    if x.shape[0] <= _gemm_tokens(tuning):
        return _gemm(x, tiled, bias, tuning)
    return dense_product(x, tiles_dense(tiled, x.dtype, tuning), bias)


def tiles_dense(tiled: TiledLinear, dtype: torch.dtype, tuning: Tuning) -> DenseParts:
    """The weight, dequantized to a 16-bit type in parts."""

    def dequantize(start: int, stop: int) -> Tensor:
        return _dequantize(tiled, dtype, start, stop, tuning)

    rows = tuning.tiled_dequantize.rows
    return DenseParts(tiled.out_features, tiled.in_features, rows, dequantize)


def tiles_token_counts(tuning: Tuning) -> tuple[int, ...]:
    """Numbers of tokens that between them need every kernel."""
    largest = tuning.tiled_gemm[-1].tokens
    several = range(2 * largest, _gemm_tokens(tuning) + 1, largest)
    smaller = (tile.tokens for tile in tuning.tiled_gemm)
    return (*smaller, *several, _gemm_tokens(tuning) + 1)


def _gemm_tokens(tuning: Tuning) -> int:
    """Tokens up to which dequantizing does not pay."""
    return TOKEN_BLOCKS * tuning.tiled_gemm[-1].tokens


def _gemm(x: Tensor, tiled: TiledLinear, bias: Tensor | None, tuning: Tuning) -> Tensor:
    tokens, out_features = x.shape[0], tiled.out_features
    shapes = tuning.tiled_gemm
    shape = next((tile for tile in shapes if tokens <= tile.tokens), shapes[-1])
    row_blocks = triton.cdiv(out_features, ROWS)
    token_blocks = triton.cdiv(tokens, shape.tokens)
    places = _multiprocessors(x.device)
    is_early = can_be_early(x.device)
    jobs = tiled.job_blocks.numel()
    # No more programs than can be there at once: the last ones would be alone.
    splits = (shape.warps * places - jobs) // (row_blocks * token_blocks)
    splits = max(1, min(splits, tiled.blocks, places))
    out = x.new_empty(tokens, out_features)
    sums = None
    if splits > 1 or jobs:
        size = (
            splits * tokens * out_features + jobs * token_blocks * ROWS * shape.tokens
        )
        sums = x.new_empty(size, dtype=torch.float32)
    turns = triton.cdiv(row_blocks, places // splits)
    tile_gemm_kernel[places, turns + triton.cdiv(jobs, places), token_blocks](
        x,
        *_codes(tiled),
        *_kept(tiled),
        tiled.job_starts,
        tiled.job_blocks,
        tiled.counters,
        bias,
        sums,
        out,
        tokens,
        out_features,
        tiled.in_features,
        tiled.blocks,
        splits,
        jobs,
        turns,
        offset_words(_DTYPES[x.dtype]),
        GROUP_SIZE=tiled.group_size,
        BITS=tiled.bits,
        IS_PADDED=_is_padded(tiled),
        HAS_BIAS=bias is not None,
        IS_SPLIT=sums is not None,
        WIDTH=OPERAND_WIDTH,
        BLOCK_WORDS=BLOCK_WORDS,
        ROWS=ROWS,
        TOKENS=shape.tokens,
        TOKEN_BLOCKS=TOKEN_BLOCKS,
        SEGMENT=SEGMENT,
        OWN_SEGMENTS=OWN_SEGMENTS,
        JOB_SEGMENTS=JOB_SEGMENTS,
        DTYPE=_DTYPES[tiled.dtype],
        IS_EARLY=is_early,
        num_warps=1,
        num_stages=1,
        maxnreg=shape.registers,
        **({"launch_pdl": True} if is_early else {}),
    )
    return out


def _dequantize(
    tiled: TiledLinear, dtype: torch.dtype, start: int, stop: int, tuning: Tuning
) -> Tensor:
    shape = tuning.tiled_dequantize
    out = tiled.qweight.new_empty(stop - start, tiled.in_features, dtype=dtype)
    row_blocks = triton.cdiv(stop - start, shape.rows)
    tile_dequantize_kernel[row_blocks, tiled.blocks](
        *_codes(tiled),
        out,
        start,
        stop,
        tiled.in_features,
        tiled.blocks,
        GROUP_SIZE=tiled.group_size,
        BITS=tiled.bits,
        IS_PADDED=_is_padded(tiled),
        BLOCK_WORDS=BLOCK_WORDS,
        GRID_ROWS=ROWS,
        ROWS=shape.rows,
        DTYPE=_DTYPES[tiled.dtype],
        num_warps=shape.warps,
    )
    add_kept_kernel[triton.cdiv(stop - start, ROWS), shape.sharers](
        *_kept(tiled),
        out,
        start,
        stop,
        tiled.in_features,
        ROWS=ROWS,
        SEGMENTS=shape.segments,
        SEGMENT=SEGMENT,
        DTYPE=_DTYPES[tiled.dtype],
        num_warps=shape.warps,
    )
    return out


def _codes(tiled: TiledLinear) -> tuple[Tensor | None, ...]:
    return tiled.qweight, tiled.qweight_high, tiled.grid


def _kept(tiled: TiledLinear) -> tuple[Tensor, ...]:
    return tiled.segment_starts, tiled.segment_columns, tiled.segments


def _is_padded(tiled: TiledLinear) -> bool:
    """Whether the last block has columns that the weight does not have."""
    return tiled.in_features < tiled.blocks * block_columns(tiled.bits)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    """How many a GPU has; in the interpreter, a number that divides little."""
    if device.type != "cuda":
        return 3
    return torch.cuda.get_device_properties(device).multi_processor_count
