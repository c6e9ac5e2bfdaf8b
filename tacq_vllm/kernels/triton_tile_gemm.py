"""Some tokens, or one, times a tiled weight on tensor cores, in one launch.

A program is one warp. What its threads load is, register by register, what tensor cores
take from them: nothing is exchanged between threads, and nothing is waited for but
memory. Programs that share rows leave their sums in a workspace, and so do those that
have a job of rows' kept weights; the last of them to end, by a counter, adds all up in
their order, so that the same inputs give the same bits.
"""

import triton
import triton.language as tl

from tacq_vllm.kernels.triton_early import let_next_begin, wait_for_last
from tacq_vllm.kernels.triton_tile_codes import (
    group_in_block,
    group_of_slice,
    groups_of_block,
    negative_zeros,
    pair_weights,
    scale_pairs,
    slice_words,
    value_pairs,
)
from tacq_vllm.kernels.triton_tile_kept import add_kept
from tacq_vllm.kernels.triton_tile_sums import add_up, job_places, store


@triton.jit
def row_share(turn, splits):
    """The rows' block and the split of a program that has its turn.

    Programs take turns on the multiprocessors: those that come to the same one have the
    same split, so that its cache holds the x that they all read. Blocks that rows do
    not have are among them.
    """
    place, places = tl.program_id(0), tl.num_programs(0)
    split = place * splits // places
    first = (split * places + splits - 1) // splits
    next_first = ((split + 1) * places + splits - 1) // splits
    return turn * (next_first - first) + place - first, split


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
    """A block's words: both halves of the low plane's, and the high plane's.

    Nobody else reads them: they do not go through the cache that x is in.
    """
    HALF: tl.constexpr = BLOCK_WORDS // 2
    low_ptr += block * BLOCK_WORDS
    first = tl.load(low_ptr, cache_modifier=".cg")
    second = tl.load(low_ptr + HALF, cache_modifier=".cg")
    if BITS == 3:
        high = tl.load(high_ptr + block * HALF, cache_modifier=".cg")
        return first, second, high
    else:
        return first, second, first


@triton.jit
def load_grid(
    grid_ptr,
    block,
    COLUMNS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """A block's words of the grid, a tuple of int32 [ROWS] for its groups."""
    words = ()
    for number in tl.static_range(groups_of_block(COLUMNS, GROUP_SIZE)):
        group = group_of_slice(block, number * GROUP_SIZE, COLUMNS, GROUP_SIZE)
        words += (tl.load(grid_ptr + group * ROWS, cache_modifier=".cg"),)
    return words


@triton.jit(do_not_specialize=["tokens", "blocks", "splits", "jobs", "turns", "offset"])
def tile_gemm_kernel(
    x_ptr,
    qweight_ptr,
    qweight_high_ptr,
    grid_ptr,
    starts_ptr,
    columns_ptr,
    segments_ptr,
    job_starts_ptr,
    job_blocks_ptr,
    counters_ptr,
    bias_ptr,
    sums_ptr,
    out_ptr,
    tokens,
    out_features,
    in_features,
    blocks,
    splits,
    jobs,
    turns,
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
    SEGMENT: tl.constexpr,
    OWN_SEGMENTS: tl.constexpr,
    JOB_SEGMENTS: tl.constexpr,
    DTYPE: tl.constexpr,
    IS_EARLY: tl.constexpr,
):
    """Multiply x [tokens, in]: out [tokens, out].

    The grid is (multiprocessors, turns and as many more as jobs need, tokens / TOKENS);
    a split adds up its share of the blocks of columns and of rows' own kept weights.
    Sums are [splits, tokens, out], then [jobs, tokens / TOKENS, ROWS, TOKENS]; where
    neither are needed, IS_SPLIT is false. `offset` is `offset_words`,
    GROUP_SIZE is 0 for groups that are whole rows, IS_PADDED says that the last block
    has more columns than x; WIDTH is of `deal`. IS_EARLY says that the kernel before
    may not have ended: until it has, only the weight is read, which it did not write.
    """
    FIELDS: tl.constexpr = 4 if BITS == 4 else 8
    HALF: tl.constexpr = BLOCK_WORDS // 2
    SLICE: tl.constexpr = 2 * BLOCK_WORDS
    COLUMNS: tl.constexpr = FIELDS * SLICE
    HALVES_ARE_GROUPS: tl.constexpr = GROUP_SIZE == SLICE // 2
    PARTS: tl.constexpr = TOKENS // 8
    X_TYPE: tl.constexpr = x_ptr.dtype.element_ty
    if IS_EARLY:
        let_next_begin()
    turn, token_block = tl.program_id(1), tl.program_id(2)
    eight = tl.arange(0, 8)
    totals = ()
    for _ in tl.static_range(PARTS):
        totals += (tl.zeros([ROWS, 8], tl.float32),)

    if IS_SPLIT and turn >= turns:
        job = (turn - turns) * tl.num_programs(0) + tl.program_id(0)
        if job < jobs:
            row_block = tl.load(job_blocks_ptr + job)
            number = job - tl.load(job_starts_ptr + row_block)
            first = tl.load(starts_ptr + row_block) + OWN_SEGMENTS
            first += number * JOB_SEGMENTS
            last = tl.load(starts_ptr + row_block + 1)
            last = tl.minimum(first + JOB_SEGMENTS, last)
            if IS_EARLY:
                wait_for_last()
            totals = add_kept(
                totals,
                x_ptr,
                columns_ptr,
                segments_ptr,
                tokens,
                in_features,
                first,
                last,
                WIDTH,
                SEGMENT,
                DTYPE,
            )
            for part in tl.static_range(PARTS):
                places = job_places(
                    sums_ptr, part, tokens, out_features, splits, ROWS, TOKENS
                )
                places += job * tl.num_programs(2) * (ROWS * TOKENS)
                tl.store(places, totals[part])
            add_up(
                counters_ptr,
                job_starts_ptr,
                sums_ptr,
                bias_ptr,
                out_ptr,
                row_block,
                tokens,
                out_features,
                splits,
                HAS_BIAS,
                ROWS,
                TOKENS,
                TOKEN_BLOCKS,
            )
        return

    row_block, split = row_share(turn, splits)
    if row_block * ROWS >= out_features:
        return
    rows = row_block * ROWS + tl.arange(0, ROWS)[:, None]
    # What is past the last row or token is computed of the last one, and not stored.
    code_rows = tl.minimum(rows, out_features - 1) * blocks
    half_words = tl.arange(0, HALF)[None, :]
    low_ptr = qweight_ptr + code_rows * BLOCK_WORDS + half_words
    high_ptr = low_ptr
    if BITS == 3:
        high_ptr = qweight_high_ptr + code_rows * HALF + half_words
    groups = blocks * COLUMNS // GROUP_SIZE if GROUP_SIZE > 0 else 1
    grid_rows = grid_ptr + row_block * groups * ROWS + tl.arange(0, ROWS)
    half_columns = tl.arange(0, SLICE // 2)[None, :]
    x_starts = ()
    for part in tl.static_range(PARTS):
        token = token_block * TOKENS + part * 8 + eight[:, None]
        x_starts += (
            x_ptr + tl.minimum(token, tokens - 1) * in_features + half_columns,
        )

    first_block = split * blocks // splits
    last_block = (split + 1) * blocks // splits
    low, low_second, high = load_words(
        low_ptr, high_ptr, first_block, BLOCK_WORDS, BITS
    )
    grid = load_grid(grid_rows, first_block, COLUMNS, GROUP_SIZE, ROWS)
    start = tl.load(starts_ptr + row_block)
    own = tl.minimum(tl.load(starts_ptr + row_block + 1) - start, OWN_SEGMENTS)
    if IS_EARLY:
        wait_for_last()
    totals = add_kept(
        totals,
        x_ptr,
        columns_ptr,
        segments_ptr,
        tokens,
        in_features,
        start + own * split // splits,
        start + own * (split + 1) // splits,
        WIDTH,
        SEGMENT,
        DTYPE,
    )
    for block in range(first_block, last_block):
        # The next block is asked for before this one is multiplied.
        next_block = tl.minimum(block + 1, last_block - 1)
        next_low, next_second, next_high = load_words(
            low_ptr, high_ptr, next_block, BLOCK_WORDS, BITS
        )
        next_grid = load_grid(grid_rows, next_block, COLUMNS, GROUP_SIZE, ROWS)
        high_second = high >> 1
        for field in tl.static_range(FIELDS):
            for half in tl.static_range(2):
                if half == 0:
                    words = slice_words(low, high, offset, field, BITS)
                else:
                    words = slice_words(low_second, high_second, offset, field, BITS)
                if half == 0 or HALVES_ARE_GROUPS:
                    group = grid[
                        group_in_block(
                            field * SLICE + half * (SLICE // 2), COLUMNS, GROUP_SIZE
                        )
                    ]
                    zeros = negative_zeros(group, offset, field, BITS)[:, None]
                    scales = scale_pairs(group, field, BITS, DTYPE, X_TYPE)[:, None]
                words = pair_weights(words, zeros, scales, X_TYPE)
                weights = deal(value_pairs(words, X_TYPE), WIDTH)
                columns = block * COLUMNS + (field * SLICE + half * (SLICE // 2))
                added = ()
                for part in tl.static_range(PARTS):
                    if IS_PADDED:
                        is_column = columns + half_columns < in_features
                        x = tl.load(x_starts[part] + columns, mask=is_column, other=0)
                    else:
                        x = tl.load(x_starts[part] + columns)
                    added += (tl.dot(weights, deal(x, WIDTH).trans(), totals[part]),)
                totals = added
        low, low_second, high = next_low, next_second, next_high
        grid = next_grid

    for part in tl.static_range(PARTS):
        token = token_block * TOKENS + part * 8 + eight[None, :]
        if IS_SPLIT:
            size = tokens.to(tl.int64) * out_features
            places = sums_ptr + split * size + token.to(tl.int64) * out_features + rows
            mask = (rows < out_features) & (token < tokens)
            tl.store(places, totals[part], mask=mask)
        else:
            total = totals[part]
            store(out_ptr, bias_ptr, total, rows, token, tokens, out_features, HAS_BIAS)
    if IS_SPLIT:
        add_up(
            counters_ptr,
            job_starts_ptr,
            sums_ptr,
            bias_ptr,
            out_ptr,
            row_block,
            tokens,
            out_features,
            splits,
            HAS_BIAS,
            ROWS,
            TOKENS,
            TOKEN_BLOCKS,
        )
