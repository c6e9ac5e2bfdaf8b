"""A tiled weight as a dense one in 16 bits, for products with very many tokens."""

import triton
import triton.language as tl

from tacq_vllm.kernels.triton_codes import entries_of_rows
from tacq_vllm.kernels.triton_tile_codes import (
    load_segments,
    scales_and_zeros,
    slice_words,
)


@triton.jit
def tile_dequantize_kernel(
    qweight_ptr,
    qweight_high_ptr,
    grid_ptr,
    out_ptr,
    first_row,
    last_row,
    out_features,
    in_features,
    GROUP_SIZE: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
    ROWS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Write rows [first_row, last_row) of W, less its kept weights, to out.

    The grid is (rows / ROWS, blocks of columns); `first_row` is a multiple of ROWS,
    GROUP_SIZE is 0 for groups that are whole rows.
    """
    FIELDS: tl.constexpr = 4 if BITS == 4 else 8
    HALVES: tl.constexpr = 2 if BITS == 3 else 1
    SLICE: tl.constexpr = 2 * BLOCK_WORDS
    COLUMNS: tl.constexpr = FIELDS * SLICE
    rows = first_row + tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    block = tl.program_id(1)
    is_row = rows < last_row
    num_words = in_features // (2 * FIELDS)
    out_rows = out_ptr + (rows - first_row).to(tl.int64) * in_features
    words = block * BLOCK_WORDS + tl.arange(0, BLOCK_WORDS)[None, :]

    high = 0
    if BITS == 3:
        places = qweight_high_ptr + rows[:, None] * (num_words // 2) + words
        high = tl.load(places, mask=is_row[:, None], other=0)
    for half in tl.static_range(HALVES):
        part = block * HALVES + half
        words = part * BLOCK_WORDS + tl.arange(0, BLOCK_WORDS)[None, :]
        places = qweight_ptr + rows[:, None] * num_words + words
        low = tl.load(places, mask=is_row[:, None], other=0)
        for field in tl.static_range(FIELDS):
            start = part * COLUMNS + field * SLICE
            group = start // GROUP_SIZE if GROUP_SIZE > 0 else 0
            word = tl.load(grid_ptr + group * out_features + rows, mask=is_row, other=0)
            scales, zeros = scales_and_zeros(word, DTYPE)
            codes = slice_words(low, high, half, field, BITS, 0)
            pairs = tl.join(codes & 0xFFFF, codes >> 16).reshape(ROWS, SLICE)
            weight = (pairs.to(tl.float32) - zeros[:, None]) * scales[:, None]
            columns = start + tl.arange(0, SLICE)
            tl.store(
                out_rows[:, None] + columns[None, :],
                weight.to(out_ptr.dtype.element_ty),
                mask=is_row[:, None],
            )


@triton.jit
def add_segments_kernel(
    starts_ptr,
    segments_ptr,
    out_ptr,
    first_row,
    last_row,
    out_features,
    in_features,
    ROWS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    SEGMENT: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Add the kept weights of rows [first_row, last_row) to dense rows.

    The grid is (rows / ROWS, any): programs of the same rows share their segments.
    """
    block = first_row // ROWS + tl.program_id(0)
    rows = block * ROWS + tl.arange(0, ROWS)
    start_row = out_ptr + (block * ROWS - first_row).to(tl.int64) * in_features
    first, last = entries_of_rows(starts_ptr, block, ROWS, out_features)
    step = tl.num_programs(1) * SEGMENTS
    for start in range(first + tl.program_id(1) * SEGMENTS, last, step):
        columns, values, owned = load_segments(
            starts_ptr,
            segments_ptr,
            start,
            last,
            rows,
            out_features,
            SEGMENTS,
            SEGMENT,
            DTYPE,
        )
        owners = tl.sum(tl.where(owned, tl.arange(0, ROWS)[:, None], 0), axis=0)
        places = start_row + owners.to(tl.int64)[:, None] * in_features + columns
        is_kept = (values != 0) & (block * ROWS + owners < last_row)[:, None]
        weight = tl.load(places, mask=is_kept, other=0).to(tl.float32) + values
        tl.store(places, weight.to(out_ptr.dtype.element_ty), mask=is_kept)
