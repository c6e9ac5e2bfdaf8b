"""A tiled weight as a dense one in 16 bits, for products with very many tokens."""

import triton
import triton.language as tl

from tacq_vllm.kernels.triton_codes import high_half
from tacq_vllm.kernels.triton_tile_codes import (
    entry_columns,
    entry_rows,
    field_unit,
    group_of_slice,
    offset_words,
    scales_and_zeros,
    slice_words,
    value_offset,
)


@triton.jit
def tile_dequantize_kernel(
    qweight_ptr,
    qweight_high_ptr,
    grid_ptr,
    out_ptr,
    first_row,
    last_row,
    in_features,
    blocks,
    GROUP_SIZE: tl.constexpr,
    BITS: tl.constexpr,
    IS_PADDED: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
    GRID_ROWS: tl.constexpr,
    ROWS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Write rows [first_row, last_row) of W, less its kept weights, to out.

    The grid is (rows / ROWS, blocks of columns); `first_row` is a multiple of ROWS,
    GROUP_SIZE is 0 for groups that are whole rows, IS_PADDED says that the last block
    has more columns than W. Scales of GRID_ROWS rows are neighbours.
    """
    FIELDS: tl.constexpr = 4 if BITS == 4 else 8
    SLICE: tl.constexpr = 2 * BLOCK_WORDS
    COLUMNS: tl.constexpr = FIELDS * SLICE
    PARTS: tl.constexpr = 2 if GROUP_SIZE == SLICE // 2 else 1
    TYPE: tl.constexpr = out_ptr.dtype.element_ty
    rows = first_row + tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    block = tl.program_id(1)
    is_row = rows < last_row
    out_rows = out_ptr + (rows - first_row).to(tl.int64) * in_features
    words = tl.arange(0, BLOCK_WORDS)[None, :]
    places = rows[:, None] * (blocks * BLOCK_WORDS) + block * BLOCK_WORDS + words
    low = tl.load(qweight_ptr + places, mask=is_row[:, None], other=0)
    high = low
    if BITS == 3:
        HALF: tl.constexpr = BLOCK_WORDS // 2
        places = rows[:, None] * (blocks * HALF) + block * HALF + words % HALF
        high = tl.load(qweight_high_ptr + places, mask=is_row[:, None], other=0)
        high >>= words // HALF
    groups = blocks * COLUMNS // GROUP_SIZE if GROUP_SIZE > 0 else 1
    grid_rows = grid_ptr + rows // GRID_ROWS * (groups * GRID_ROWS) + rows % GRID_ROWS
    parts = tl.arange(0, PARTS)[None, :] * GRID_ROWS
    for field in tl.static_range(FIELDS):
        group = group_of_slice(block, field * SLICE, COLUMNS, GROUP_SIZE)
        places = grid_rows[:, None] + group * GRID_ROWS + parts
        grid = tl.load(places, mask=is_row[:, None], other=0)
        scales, zeros = scales_and_zeros(grid, DTYPE)
        unit = field_unit(field, BITS)
        codes = slice_words(low, high, offset_words(TYPE), field, BITS)
        values = tl.join(high_half(codes << 16, TYPE), high_half(codes, TYPE))
        values = values.reshape(ROWS, PARTS, SLICE // PARTS)
        # Exact: what is taken off has as few bits, and units are powers of 2.
        codes_off_zero = values - (value_offset(TYPE) + zeros / unit)[:, :, None]
        weight = codes_off_zero * (scales * unit)[:, :, None]
        weight = weight.to(TYPE).reshape(ROWS, SLICE)
        columns = block * COLUMNS + field * SLICE + tl.arange(0, SLICE)[None, :]
        mask = is_row[:, None]
        if IS_PADDED:
            mask = mask & (columns < in_features)
        tl.store(out_rows[:, None] + columns, weight, mask=mask)


@triton.jit
def add_kept_kernel(
    starts_ptr,
    columns_ptr,
    segments_ptr,
    out_ptr,
    first_row,
    last_row,
    in_features,
    ROWS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    SEGMENT: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Add the kept weights of rows [first_row, last_row) to dense rows.

    The grid is (rows / ROWS, any): programs of the same rows share their segments.
    """
    starts_ptr += first_row // ROWS + tl.program_id(0)
    first, last = tl.load(starts_ptr), tl.load(starts_ptr + 1)
    step = tl.num_programs(1) * SEGMENTS
    for start in range(first + tl.program_id(1) * SEGMENTS, last, step):
        numbers = start + tl.arange(0, SEGMENTS)
        is_segment = numbers < last
        panels = tl.load(columns_ptr + numbers, mask=is_segment, other=0)[:, None]
        places = numbers[:, None] * SEGMENT + tl.arange(0, SEGMENT)[None, :]
        words = tl.load(segments_ptr + places, mask=is_segment[:, None], other=0)
        rows = tl.program_id(0) * ROWS + entry_rows(words)
        values = high_half(words, DTYPE)
        places = rows.to(tl.int64) * in_features + entry_columns(words, panels)
        is_kept = (values != 0) & (rows < last_row - first_row)
        weight = (
            tl.load(out_ptr + places, mask=is_kept, other=0).to(tl.float32) + values
        )
        tl.store(out_ptr + places, weight.to(out_ptr.dtype.element_ty), mask=is_kept)
