"""Some tokens, or one, times a tiled weight on tensor cores, in one launch.

Codes are multiplied as they are; scale and zero-point come once for a slice:

    Σ (code - zero) · scale · x
        = scale · (unit · Σ value · x - (unit · offset + zero) · Σ x)

with the values, the unit and the offset of `triton_tile_codes`. A program is one warp.
What its threads load is, register by register, what tensor cores take from them:
nothing is exchanged between threads, and nothing is waited for but memory. Programs
that share rows leave their sums in a workspace; the last of them to end, by a counter,
adds all up in their order, so that the same inputs give the same bits.
"""

import triton
import triton.language as tl

from tacq_vllm.kernels.triton_codes import entries_of_rows
from tacq_vllm.kernels.triton_tile_codes import (
    field_unit,
    group_of_slice,
    load_segments,
    offset_words,
    scales_and_zeros,
    slice_words,
    value_offset,
    value_pairs,
)


@triton.jit
def deal(values, WIDTH: tl.constexpr):
    """Columns [n, 32] in another order, the same for weights and for x.

    A thread has loaded eight of them. Tensor cores want two pairs from it at a time: in
    this order those are two pairs that it has side by side. WIDTH is how many columns
    Triton gives a thread before the next thread's begin, 2 or 4.
    """
    pairs = values.reshape(values.shape[0], 4, 2, 2, 2)
    pairs = pairs.permute((0, 2, 3, 1, 4) if WIDTH == 2 else (0, 3, 1, 2, 4))
    return pairs.reshape(values.shape[0], 32)


@triton.jit
def load_words(low_ptr, high_ptr, block, BLOCK_WORDS: tl.constexpr, BITS: tl.constexpr):
    """A block's words: both halves of the low plane's, and the high plane's."""
    HALF: tl.constexpr = BLOCK_WORDS // 2
    first = tl.load(low_ptr + block * BLOCK_WORDS)
    second = tl.load(low_ptr + block * BLOCK_WORDS + HALF)
    if BITS == 3:
        return first, second, tl.load(high_ptr + block * HALF)
    else:
        return first, second, first


@triton.jit
def kept_sums(
    x_ptr,
    starts_ptr,
    segments_ptr,
    tokens,
    out_features,
    in_features,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    SEGMENT: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """A program's share of its rows' kept weights times x: float32 [ROWS, TOKENS]."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    first_token = tl.program_id(2) * TOKENS
    last_token = tl.minimum(first_token + TOKENS, tokens)
    numbers = first_token + tl.arange(0, TOKENS)
    split, splits = tl.program_id(1), tl.num_programs(1)
    total = tl.zeros([ROWS, TOKENS], tl.float32)
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
        sums = tl.zeros([SEGMENTS, TOKENS], tl.float32)
        for token in range(first_token, last_token):
            x = tl.load(x_ptr + token * in_features + columns).to(tl.float32)
            segment_sums = tl.sum(values * x, axis=1)
            sums = tl.where(numbers[None, :] == token, segment_sums[:, None], sums)
        # Which of the sums are whose, as a product that loses nothing.
        total = tl.dot(owned.to(tl.float32), sums, total, input_precision="tf32x3")
    return total


@triton.jit(do_not_specialize=["tokens", "blocks", "split_blocks", "offset"])
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
    blocks,
    split_blocks,
    offset,
    GROUP_SIZE: tl.constexpr,
    BITS: tl.constexpr,
    IS_PADDED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    TOKEN_BLOCKS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    SEGMENT: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Multiply x [tokens, in]: out [tokens, out]; sums are [splits, tokens, out].

    The grid is (out / ROWS, splits, tokens / TOKENS): a split adds up `split_blocks`
    blocks of columns, and its share of the rows' kept weights. `offset` is
    `offset_words`, GROUP_SIZE is 0 for groups that are whole rows, IS_PADDED says that
    the last block has more columns than x; WIDTH is of `deal`.
    """
    FIELDS: tl.constexpr = 4 if BITS == 4 else 8
    SLICE: tl.constexpr = 2 * BLOCK_WORDS
    COLUMNS: tl.constexpr = FIELDS * SLICE
    HALVES_ARE_GROUPS: tl.constexpr = GROUP_SIZE == SLICE // 2
    X_TYPE: tl.constexpr = x_ptr.dtype.element_ty
    OFFSET: tl.constexpr = value_offset(X_TYPE)
    # The difference of two numbers in both halves of a word.
    TO_ONES: tl.constexpr = (0x3F803F80 if X_TYPE.is_bf16() else 0x3C003C00) - (
        offset_words(X_TYPE)
    )
    row_block, split, splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    rows = row_block * ROWS + tl.arange(0, ROWS)
    numbers = tl.program_id(2) * TOKENS + tl.arange(0, TOKENS)
    # What is past the last row or token is computed of the last one, and not stored.
    code_rows = tl.minimum(rows, out_features - 1)[:, None] * blocks
    half_words = tl.arange(0, BLOCK_WORDS // 2)[None, :]
    low_ptr = qweight_ptr + code_rows * BLOCK_WORDS + half_words
    high_ptr = low_ptr
    if BITS == 3:
        high_ptr = qweight_high_ptr + code_rows * (BLOCK_WORDS // 2) + half_words
    half_columns = tl.arange(0, SLICE // 2)[None, :]
    x_rows = tl.minimum(numbers, tokens - 1)[:, None] * in_features
    x_starts = x_ptr + x_rows + half_columns
    groups = blocks * COLUMNS // GROUP_SIZE if GROUP_SIZE > 0 else 1
    grid_rows = grid_ptr + row_block * groups * ROWS + tl.arange(0, ROWS)
    # Made of an argument: of constants that it knows, the compiler makes operands anew
    # for every instruction.
    ones = value_pairs(tl.zeros([16, 16], tl.int32) + (offset + TO_ONES), X_TYPE)
    ones = deal(ones, WIDTH)

    first_block = split * split_blocks
    last_block = tl.minimum(first_block + split_blocks, blocks)
    low, low_second, high = load_words(
        low_ptr, high_ptr, first_block, BLOCK_WORDS, BITS
    )
    total = kept_sums(
        x_ptr,
        starts_ptr,
        segments_ptr,
        tokens,
        out_features,
        in_features,
        ROWS,
        TOKENS,
        SEGMENTS,
        SEGMENT,
        DTYPE,
    )
    for block in range(first_block, last_block):
        # The next block is asked for before this one is multiplied.
        next_low, next_second, next_high = load_words(
            low_ptr,
            high_ptr,
            tl.minimum(block + 1, last_block - 1),
            BLOCK_WORDS,
            BITS,
        )
        high_second = high >> 1
        for field in tl.static_range(FIELDS):
            for half in tl.static_range(2):
                if half == 0 or HALVES_ARE_GROUPS:
                    dots = tl.zeros([ROWS, TOKENS], tl.float32)
                    x_sums = tl.zeros([ROWS, TOKENS], tl.float32)
                start = block * COLUMNS + (field * SLICE + half * (SLICE // 2))
                if IS_PADDED:
                    is_column = start + half_columns < in_features
                    x = tl.load(x_starts + start, mask=is_column, other=0)
                else:
                    x = tl.load(x_starts + start)
                x = deal(x, WIDTH).trans()
                if half == 0:
                    words = slice_words(low, high, offset, field, BITS)
                else:
                    words = slice_words(low_second, high_second, offset, field, BITS)
                values = deal(value_pairs(words, X_TYPE), WIDTH)
                dots = tl.dot(values, x, dots)
                # As many times as there are rows, but no data moves between threads.
                x_sums = tl.dot(ones, x, x_sums)
                if half == 1 or HALVES_ARE_GROUPS:
                    group = group_of_slice(
                        block, field * SLICE + half * (SLICE // 2), COLUMNS, GROUP_SIZE
                    )
                    grid = tl.load(grid_rows + group * ROWS)
                    scales, zeros = scales_and_zeros(grid, DTYPE)
                    units = scales * field_unit(field, BITS)
                    shifts = scales * (zeros + OFFSET * field_unit(field, BITS))
                    total += units[:, None] * dots
                    total -= shifts[:, None] * x_sums
        low, low_second, high = next_low, next_second, next_high

    place = numbers.to(tl.int64)[None, :] * out_features + rows[:, None]
    is_row = rows < out_features
    mask = is_row[:, None] & (numbers < tokens)[None, :]
    if IS_SPLIT:
        size = tokens.to(tl.int64) * out_features
        tl.store(sums_ptr + split * size + place, total, mask=mask)
        # Every thread's sums are stored before one thread counts.
        tl.debug_barrier()
        counter = counters_ptr + row_block * TOKEN_BLOCKS + tl.program_id(2)
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
