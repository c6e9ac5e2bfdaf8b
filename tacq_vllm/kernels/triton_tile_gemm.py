"""Some tokens, or one, times a tiled weight on tensor cores, in one launch.

Codes are multiplied as they are; scale and zero-point come once for a slice:

    Σ (code - zero) · scale · x = scale · (Σ value · x - (offset + zero) · Σ x)

with the values and the offset of triton_tile_codes. Programs that share rows leave
their sums in a workspace; the last of them to end, by a counter, adds all up in their
order, so that the same inputs give the same bits.
"""

import triton
import triton.language as tl

from tacq_vllm.kernels.triton_codes import entries_of_rows
from tacq_vllm.kernels.triton_tile_codes import (
    load_segments,
    scales_and_zeros,
    slice_values,
    value_offset,
)


@triton.constexpr_function
def ends_group(field, fields, slice_size, group_size):
    """Whether sums need their scale before another field: a group or block ends."""
    return field == fields or (group_size > 0 and field * slice_size % group_size == 0)


@triton.constexpr_function
def groups_in(columns, group_size):
    """How many groups some columns need the grid of."""
    return columns // group_size if 0 < group_size < columns else 1


@triton.jit(do_not_specialize=["tokens"])
def tile_gemm_kernel(
    x_ptr,
    qweight_ptr,
    qweight_high_ptr,
    grid_ptr,
    starts_ptr,
    segments_ptr,
    counters_ptr,
    bias_ptr,
    sums_ptr,
    out_ptr,
    tokens,
    out_features,
    in_features,
    split_blocks,
    GROUP_SIZE: tl.constexpr,
    BITS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    SEGMENT: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Multiply x [tokens, in]: out [tokens, out]; sums are [splits, tokens, out].

    The grid is (out / ROWS, splits): a split adds up `split_blocks` blocks of columns,
    and its share of the rows' kept weights. There are at most TOKENS tokens, GROUP_SIZE
    is 0 for groups that are whole rows.
    """
    FIELDS: tl.constexpr = 4 if BITS == 4 else 8
    HALVES: tl.constexpr = 2 if BITS == 3 else 1
    SLICE: tl.constexpr = 2 * BLOCK_WORDS
    COLUMNS: tl.constexpr = FIELDS * SLICE
    X_TYPE: tl.constexpr = x_ptr.dtype.element_ty
    OFFSET: tl.constexpr = value_offset(X_TYPE)
    GROUPS: tl.constexpr = groups_in(HALVES * COLUMNS, GROUP_SIZE)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    numbers = tl.arange(0, TOKENS)
    split, splits = tl.program_id(1), tl.num_programs(1)
    is_row, is_token = rows < out_features, numbers < tokens
    x_starts = x_ptr + numbers[None, :] * in_features
    num_words = in_features // (2 * FIELDS)
    low_starts = qweight_ptr + rows[:, None] * num_words
    if BITS == 3:
        high_starts = qweight_high_ptr + rows[:, None] * (num_words // 2)
    block_words = tl.arange(0, BLOCK_WORDS)[None, :]
    ones = tl.full([ROWS, SLICE], 1.0, X_TYPE)

    total = tl.zeros([ROWS, TOKENS], tl.float32)
    last_block = tl.minimum(
        (split + 1) * split_blocks, in_features // (HALVES * COLUMNS)
    )
    for block in range(split * split_blocks, last_block):
        # All that a block needs is asked for before the first of it is waited for.
        grids = ()
        for number in tl.static_range(GROUPS):
            start = block * HALVES * COLUMNS + number * (HALVES * COLUMNS // GROUPS)
            group = start // GROUP_SIZE if GROUP_SIZE > 0 else 0
            place = grid_ptr + group * out_features + rows
            grids += (tl.load(place, mask=is_row, other=0),)  # type: ignore[assignment]
        high = 0
        if BITS == 3:
            words = block * BLOCK_WORDS + block_words
            high = tl.load(high_starts + words, mask=is_row[:, None], other=0)
        for half in tl.static_range(HALVES):
            part = block * HALVES + half
            words = part * BLOCK_WORDS + block_words
            low = tl.load(low_starts + words, mask=is_row[:, None], other=0)
            dots = tl.zeros([ROWS, TOKENS], tl.float32)
            x_sums = tl.zeros([ROWS, TOKENS], tl.float32)
            for field in tl.static_range(FIELDS):
                start = part * COLUMNS + field * SLICE
                columns = start + tl.arange(0, SLICE)
                x = tl.load(
                    x_starts + columns[:, None], mask=is_token[None, :], other=0
                )
                values = slice_values(low, high, half, field, BITS, X_TYPE)
                dots = tl.dot(values, x, dots)
                # As many times as there are rows, but no data moves between threads.
                x_sums = tl.dot(ones, x, x_sums)
                if ends_group(field + 1, FIELDS, SLICE, GROUP_SIZE):
                    scales, zeros = scales_and_zeros(
                        grids[(half * FIELDS + field) * GROUPS // (HALVES * FIELDS)],
                        DTYPE,
                    )
                    shifts = scales * (zeros + OFFSET)
                    total += scales[:, None] * dots - shifts[:, None] * x_sums
                    dots = tl.zeros([ROWS, TOKENS], tl.float32)
                    x_sums = tl.zeros([ROWS, TOKENS], tl.float32)

    first, last = entries_of_rows(starts_ptr, tl.program_id(0), ROWS, out_features)
    for start in range(first + split * SEGMENTS, last, splits * SEGMENTS):
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
        x = tl.load(
            x_ptr + columns[:, :, None] + (numbers * in_features)[None, None, :],
            mask=is_token[None, None, :],
            other=0,
        ).to(tl.float32)
        sums = tl.sum(values[:, :, None] * x, axis=1)
        # Which of the sums are whose, as a product that loses nothing.
        total = tl.dot(owned.to(tl.float32), sums, total, input_precision="tf32x3")

    place = numbers.to(tl.int64)[None, :] * out_features + rows[:, None]
    mask = is_row[:, None] & is_token[None, :]
    if IS_SPLIT:
        size = tokens.to(tl.int64) * out_features
        tl.store(sums_ptr + split * size + place, total, mask=mask)
        # Every thread's sums are stored before one thread counts.
        tl.debug_barrier()
        counter = counters_ptr + tl.program_id(0)
        if tl.atomic_add(counter, 1, sem="acq_rel") != splits - 1:
            return
        tl.store(counter, 0)
        total = tl.zeros([ROWS, TOKENS], tl.float32)
        for number in range(splits):
            total += tl.load(
                sums_ptr + number * size + place,
                mask=mask,
                other=0,
                cache_modifier=".cg",
            )
    if HAS_BIAS:
        total += tl.load(bias_ptr + rows, mask=is_row, other=0).to(tl.float32)[:, None]
    tl.store(out_ptr + place, total.to(out_ptr.dtype.element_ty), mask=mask)
