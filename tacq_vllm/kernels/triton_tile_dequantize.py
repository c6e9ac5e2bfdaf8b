"""A tiled weight as a dense one in 16 bits, for products with very many tokens."""

import triton
import triton.language as tl

from tacq_vllm.kernels.triton_codes import high_half
from tacq_vllm.kernels.triton_tile_blocks import (
    code_places,
    grid_places,
    load_block,
)
from tacq_vllm.kernels.triton_tile_codes import (
    STRIP,
    block_columns,
    entry_columns,
    entry_rows,
    group_of_strip,
    offset_words,
    scales_and_zeros,
    strip_unit,
    strip_words,
    value_offset,
)


@triton.jit
def tile_dequantize_kernel(
    qweight_ptr,
    grid_ptr,
    out_ptr,
    first_row,
    last_row,
    in_features,
    blocks,
    GROUP_SIZE: tl.constexpr,
    BITS: tl.constexpr,
    IS_PADDED: tl.constexpr,
    GRID_ROWS: tl.constexpr,
    ROWS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Write rows [first_row, last_row) of W, less its kept weights, to out.

    The grid is (rows / ROWS, blocks of columns); `first_row` is a multiple of ROWS,
    GROUP_SIZE is 0 for groups that are whole rows, IS_PADDED says that the last block
    has more columns than W. Scales of GRID_ROWS rows are neighbours.
    """
    COLUMNS: tl.constexpr = block_columns(BITS)
    TYPE: tl.constexpr = out_ptr.dtype.element_ty
    rows = first_row + tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    block = tl.program_id(1)
    is_row = (rows < last_row)[:, None]
    out_rows = out_ptr + ((rows - first_row).to(tl.int64) * in_features)[:, None]
    # What is past the last row is computed of the last one, and not stored.
    rows = tl.minimum(rows, last_row - 1)
    code_ptr = code_places(qweight_ptr, rows[:, None], blocks, BITS)
    groups = blocks * COLUMNS // GROUP_SIZE if GROUP_SIZE > 0 else 1
    grid_rows = grid_places(grid_ptr, rows, groups, GRID_ROWS)
    words, grid = load_block(code_ptr, grid_rows, block, GROUP_SIZE, BITS, GRID_ROWS)
    for number in tl.static_range(COLUMNS // STRIP):
        group = grid[group_of_strip(number, COLUMNS, GROUP_SIZE)]
        scales, zeros = scales_and_zeros(group, DTYPE)
        unit = strip_unit(number, BITS)
        pairs = strip_words(words, offset_words(TYPE), number, BITS)
        values = tl.join(high_half(pairs << 16, TYPE), high_half(pairs, TYPE))
        # Exact: what is taken off has as few bits, and units are powers of 2.
        codes_off_zero = values.reshape(ROWS, STRIP) - (
            value_offset(TYPE) + zeros[:, None] / unit
        )
        weight = (codes_off_zero * (scales * unit)[:, None]).to(TYPE)
        columns = block * COLUMNS + number * STRIP + tl.arange(0, STRIP)[None, :]
        mask = is_row
        if IS_PADDED:
            mask = mask & (columns < in_features)
        tl.store(out_rows + columns, weight, mask=mask)


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
        places = rows.to(tl.int64) * in_features + panels + entry_columns(words)
        is_kept = (values != 0) & (rows < last_row - first_row)
        weight = (
            tl.load(out_ptr + places, mask=is_kept, other=0).to(tl.float32) + values
        )
        tl.store(out_ptr + places, weight.to(out_ptr.dtype.element_ty), mask=is_kept)
