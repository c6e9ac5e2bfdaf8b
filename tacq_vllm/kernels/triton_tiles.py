"""The linear of a tiled weight on an NVIDIA GPU, in Triton.

| tokens | way |
| --- | --- |
| few | `triton_tile_gemm`: tensor cores, programs of one warp |
| a batch | `triton_tile_batch`: tensor cores, programs whose warps share x |
| more | `triton_tile_dequantize` into a workspace, then PyTorch's product |
"""

from typing import TypeVar

import torch
import triton
import triton.language as tl
from packaging.version import Version
from torch import Tensor

from tacq_vllm.kernels.tiles import (
    JOB_SEGMENTS,
    OWN_SEGMENTS,
    ROWS,
    SEGMENT,
    TOKEN_BLOCKS,
    TiledLinear,
    block_columns,
)
from tacq_vllm.kernels.triton_dense import DenseParts, dense_product
from tacq_vllm.kernels.triton_device import major_capability, multiprocessors
from tacq_vllm.kernels.triton_early import can_be_early
from tacq_vllm.kernels.triton_tile_batch import tile_batch_kernel, transpose_kernel
from tacq_vllm.kernels.triton_tile_codes import offset_words
from tacq_vllm.kernels.triton_tile_dequantize import (
    add_kept_kernel,
    tile_dequantize_kernel,
)
from tacq_vllm.kernels.triton_tile_gemm import tile_gemm_kernel
from tacq_vllm.kernels.triton_tuning import TiledBatch, TiledGemm, Tuning

BATCH_STEP = 32
"""Tokens of a batch whose sums are added up at a time."""
TRANSPOSE_COLUMNS = 64
"""Columns of x that one program transposes."""

_Shape = TypeVar("_Shape", TiledGemm, TiledBatch)
_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def tiles_product(
    x: Tensor, tiled: TiledLinear, bias: Tensor | None, tuning: Tuning
) -> Tensor:
    """Multiply x [tokens, in], contiguous, 16 bits, with the weight: [tokens, out]."""
    tokens = x.shape[0]
    if tokens <= tuning.tiled_gemm[-1].tokens:
        return _gemm(x, tiled, bias, _smallest(tuning.tiled_gemm, tokens))
    if tokens <= _batch_tokens(tuning):
        return _batch(x, tiled, bias, _smallest(tuning.tiled_batch, tokens))
    return dense_product(x, tiles_dense(tiled, x.dtype, tuning), bias)


def tiles_dense(tiled: TiledLinear, dtype: torch.dtype, tuning: Tuning) -> DenseParts:
    """The weight, dequantized to a 16-bit type in parts."""

    def dequantize(start: int, stop: int) -> Tensor:
        return _dequantize(tiled, dtype, start, stop, tuning)

    rows = tuning.tiled_dequantize.rows
    return DenseParts(tiled.out_features, tiled.in_features, rows, dequantize)


def tiles_token_counts(tuning: Tuning) -> tuple[int, ...]:
    """Numbers of tokens that between them need every kernel."""
    few = [shape.tokens for shape in tuning.tiled_gemm]
    batches = [shape.tokens for shape in tuning.tiled_batch]
    most = _batch_tokens(tuning)
    blocks = range(2 * batches[-1], most + 1, batches[-1]) if batches else []
    return (*few, *batches, *blocks, max(most, few[-1]) + 1)


def operand_width(major: int, warps: int) -> int:
    """Columns of an operand that Triton gives a thread before the next thread's begin.

    Another number gives the same products; but then operands are exchanged between
    threads. On GPUs of the major compute capability 9 four warps multiply together.
    """
    is_newer = Version(triton.__version__) >= Version("3.8")
    return 2 if is_newer or (major == 9 and warps == 4) else 4


def _batch_tokens(tuning: Tuning) -> int:
    """Tokens up to which `triton_tile_batch` multiplies."""
    return TOKEN_BLOCKS * tuning.tiled_batch[-1].tokens if tuning.tiled_batch else 0


def _smallest(shapes: tuple[_Shape, ...], tokens: int) -> _Shape:
    """The first that takes all tokens at once, or else the last."""
    return next((shape for shape in shapes if tokens <= shape.tokens), shapes[-1])


def _gemm(
    x: Tensor, tiled: TiledLinear, bias: Tensor | None, shape: TiledGemm
) -> Tensor:
    tokens, out_features = x.shape[0], tiled.out_features
    row_blocks = triton.cdiv(out_features, ROWS)
    places = multiprocessors(x.device)
    is_early = can_be_early(x.device)
    jobs = tiled.job_blocks.numel()
    # No more programs than can be there at once: the last ones would be alone.
    splits = (shape.warps * places - jobs) // row_blocks
    splits = max(1, min(splits, tiled.blocks, places))
    out = x.new_empty(tokens, out_features)
    sums = None
    if splits > 1 or jobs:
        size = splits * tokens * out_features + jobs * ROWS * shape.tokens
        sums = x.new_empty(size, dtype=torch.float32)
    turns = triton.cdiv(row_blocks, places // splits)
    tile_gemm_kernel[places, turns + triton.cdiv(jobs, places)](
        x,
        tiled.qweight,
        tiled.grid,
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
        WIDTH=operand_width(major_capability(x.device), 1),
        ROWS=ROWS,
        TOKENS=shape.tokens,
        COUNTERS=TOKEN_BLOCKS,
        SEGMENT=SEGMENT,
        OWN_SEGMENTS=OWN_SEGMENTS,
        JOB_SEGMENTS=JOB_SEGMENTS,
        DTYPE=_DTYPES[tiled.dtype],
        IS_EARLY=is_early,
        **shape.options,
        **({"launch_pdl": True} if is_early else {}),
    )
    return out


def _batch(
    x: Tensor, tiled: TiledLinear, bias: Tensor | None, shape: TiledBatch
) -> Tensor:
    tokens, out_features = x.shape[0], tiled.out_features
    row_blocks = triton.cdiv(out_features, ROWS * shape.warps)
    token_blocks = triton.cdiv(tokens, shape.tokens)
    places = multiprocessors(x.device)
    splits = shape.programs * places // (row_blocks * token_blocks)
    splits = max(1, min(splits, tiled.blocks, places))
    out = x.new_empty(tokens, out_features)
    sums = None
    if splits > 1:
        sums = x.new_empty(splits, tokens, out_features, dtype=torch.float32)
    columns = tiled.blocks * block_columns(tiled.bits)
    transposed = x.new_empty(token_blocks, columns, shape.tokens)
    transpose_kernel[triton.cdiv(columns, TRANSPOSE_COLUMNS), token_blocks](
        x,
        transposed,
        tokens,
        tiled.in_features,
        columns,
        TOKENS=shape.tokens,
        COLUMNS=TRANSPOSE_COLUMNS,
        **shape.options,
    )
    turns = triton.cdiv(row_blocks, places // splits)
    tile_batch_kernel[places, turns, token_blocks](
        transposed,
        tiled.qweight,
        tiled.grid,
        *_kept(tiled),
        tiled.counters,
        bias,
        sums,
        out,
        tokens,
        out_features,
        tiled.blocks,
        splits,
        offset_words(_DTYPES[x.dtype]),
        GROUP_SIZE=tiled.group_size,
        BITS=tiled.bits,
        HAS_BIAS=bias is not None,
        IS_SPLIT=splits > 1,
        WIDTH=operand_width(major_capability(x.device), shape.warps),
        BLOCK_ROWS=ROWS,
        WARPS=shape.warps,
        TOKENS=shape.tokens,
        STEP=BATCH_STEP,
        COUNTERS=TOKEN_BLOCKS,
        SEGMENT=SEGMENT,
        DTYPE=_DTYPES[tiled.dtype],
        **shape.options,
    )
    return out


def _dequantize(
    tiled: TiledLinear, dtype: torch.dtype, start: int, stop: int, tuning: Tuning
) -> Tensor:
    shape = tuning.tiled_dequantize
    out = tiled.qweight.new_empty(stop - start, tiled.in_features, dtype=dtype)
    row_blocks = triton.cdiv(stop - start, shape.rows)
    tile_dequantize_kernel[row_blocks, tiled.blocks](
        tiled.qweight,
        tiled.grid,
        out,
        start,
        stop,
        tiled.in_features,
        tiled.blocks,
        GROUP_SIZE=tiled.group_size,
        BITS=tiled.bits,
        IS_PADDED=_is_padded(tiled),
        GRID_ROWS=ROWS,
        ROWS=shape.rows,
        DTYPE=_DTYPES[tiled.dtype],
        **shape.options,
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
        **shape.options,
    )
    return out


def _kept(tiled: TiledLinear) -> tuple[Tensor, ...]:
    return tiled.segment_starts, tiled.segment_columns, tiled.segments


def _is_padded(tiled: TiledLinear) -> bool:
    """Whether the last block has columns that the weight does not have."""
    return tiled.in_features < tiled.blocks * block_columns(tiled.bits)
