"""Some tokens, or one, times a tiled weight on tensor cores, in one launch.

A program is one warp. What its threads load is, register by register, what tensor cores
take from them: nothing is exchanged between threads, and nothing is waited for but
memory. Programs that share rows leave their sums in a workspace, and so do those that
have a job of rows' kept weights; the last of them to end, by a counter, adds all up in
their order, so that the same inputs give the same bits.
"""

import triton
import triton.language as tl

from tacq_vllm.kernels.triton_codes import high_half
from tacq_vllm.kernels.triton_early import let_next_begin, wait_for_last
from tacq_vllm.kernels.triton_tile_blocks import (
    code_places,
    deal,
    deal_pairs,
    load_block,
    row_share,
    strip_codes,
)
from tacq_vllm.kernels.triton_tile_codes import (
    PART_WORDS,
    STRIP,
    block_columns,
    ends_group,
    group_of_strip,
    in_register,
)
from tacq_vllm.kernels.triton_tile_kept import add_kept, load_segments
from tacq_vllm.kernels.triton_tile_sums import (
    add_up,
    job_places,
    store,
    store_sums,
)


@triton.jit
def spread(values, COUNT: tl.constexpr):
    """Values [32, 2] of threads' rows, for COUNT columns of each: [16, 4 · COUNT].

    Four threads that follow each other have the same row of either half, of words and
    of sums: each already has the values of its own.
    """
    values = tl.broadcast_to(values.trans().reshape(16, 4, 1), (16, 4, COUNT))
    return values.reshape(16, 4 * COUNT)


@triton.jit(do_not_specialize=["tokens", "blocks", "splits", "jobs", "turns", "offset"])
def tile_gemm_kernel(
    x_ptr,
    qweight_ptr,
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
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    COUNTERS: tl.constexpr,
    SEGMENT: tl.constexpr,
    OWN_SEGMENTS: tl.constexpr,
    JOB_SEGMENTS: tl.constexpr,
    DTYPE: tl.constexpr,
    IS_EARLY: tl.constexpr,
):
    """Multiply x [tokens, in]: out [tokens, out].

    The grid is (multiprocessors, turns and as many more as jobs need); a split adds up
    its share of the blocks of columns and of rows' own kept weights. Sums are
    [splits, tokens, out], then [jobs, ROWS, TOKENS]; where neither are needed, IS_SPLIT
    is false. There are up to TOKENS tokens. `offset` is `offset_words`,
    GROUP_SIZE is 0 for groups that are whole rows, IS_PADDED says that the last block
    has more columns than x; WIDTH is of `deal`. IS_EARLY says that the kernel before
    may not have ended: until it has, only the weight is read, which it did not write.
    """
    COLUMNS: tl.constexpr = block_columns(BITS)
    PARTS: tl.constexpr = TOKENS // 8
    STEP: tl.constexpr = 2
    X_TYPE: tl.constexpr = x_ptr.dtype.element_ty
    offset = in_register(offset)
    if IS_EARLY:
        let_next_begin()
    turn = tl.program_id(1)
    eight = tl.arange(0, 8)
    no_sums = ()
    for _ in tl.static_range(PARTS):
        no_sums += (tl.zeros([ROWS, 8], tl.float32),)
    totals = no_sums

    if IS_SPLIT and turn >= turns:
        job = (turn - turns) * tl.num_programs(0) + tl.program_id(0)
        if job < jobs:
            row_block = tl.load(job_blocks_ptr + job)
            number = job - tl.load(job_starts_ptr + row_block)
            first = tl.load(starts_ptr + row_block) + OWN_SEGMENTS
            first += number * JOB_SEGMENTS
            last = tl.load(starts_ptr + row_block + 1)
            last = tl.minimum(first + JOB_SEGMENTS, last)
            kept = load_segments(columns_ptr, segments_ptr, first, last, STEP, SEGMENT)
            if IS_EARLY:
                wait_for_last()
            totals = add_kept(
                totals,
                kept,
                x_ptr,
                columns_ptr,
                segments_ptr,
                tokens,
                in_features,
                first,
                last,
                WIDTH,
                STEP,
                SEGMENT,
                DTYPE,
            )
            size = tokens.to(tl.int64) * out_features
            job_sums = sums_ptr + splits * size + job * (ROWS * TOKENS)
            for part in tl.static_range(PARTS):
                places = job_sums + job_places(part, ROWS, TOKENS, 8)
                tl.store(places, totals[part])
            add_up(
                counters_ptr + row_block * COUNTERS,
                sums_ptr,
                bias_ptr,
                out_ptr,
                row_block,
                0,
                tokens,
                out_features,
                splits,
                tl.load(job_starts_ptr + row_block),
                tl.load(job_starts_ptr + row_block + 1),
                HAS_BIAS,
                ROWS,
                TOKENS,
                8,
            )
        return

    row_block, split = row_share(turn, splits)
    if row_block * ROWS >= out_features:
        return
    rows = row_block * ROWS + tl.arange(0, ROWS)[:, None]
    # What is past the last row or token is computed of the last one, and not stored.
    code_rows = tl.minimum(rows, out_features - 1)
    code_ptr = code_places(qweight_ptr, code_rows, blocks, BITS)
    groups = blocks * COLUMNS // GROUP_SIZE if GROUP_SIZE > 0 else 1
    # A thread has a row of either half: their scales are neighbours.
    grid_rows = grid_ptr + row_block * groups * ROWS
    grid_rows += tl.arange(0, 32)[:, None] // 4 * 2 + tl.arange(0, 2)[None, :]
    strip_columns = tl.arange(0, STRIP)[None, :]
    x_starts = ()
    for part in tl.static_range(PARTS):
        token = part * 8 + eight[:, None]
        x_starts += (
            x_ptr + tl.minimum(token, tokens - 1) * in_features + strip_columns,
        )

    first_block = split * blocks // splits
    last_block = (split + 1) * blocks // splits
    words, grid = load_block(code_ptr, grid_rows, first_block, GROUP_SIZE, BITS, ROWS)
    # Compilers would ask for it after what kept weights have to wait for.
    tl.debug_barrier()
    start = tl.load(starts_ptr + row_block)
    own = tl.minimum(tl.load(starts_ptr + row_block + 1) - start, OWN_SEGMENTS)
    first = start + own * split // splits
    last = start + own * (split + 1) // splits
    kept = load_segments(columns_ptr, segments_ptr, first, last, STEP, SEGMENT)
    if IS_EARLY:
        wait_for_last()
    totals = add_kept(
        totals,
        kept,
        x_ptr,
        columns_ptr,
        segments_ptr,
        tokens,
        in_features,
        first,
        last,
        WIDTH,
        STEP,
        SEGMENT,
        DTYPE,
    )
    for block in range(first_block, last_block):
        # The next block is asked for before this one is multiplied.
        next_block = tl.minimum(block + 1, last_block - 1)
        next_words, next_grid = load_block(
            code_ptr, grid_rows, next_block, GROUP_SIZE, BITS, ROWS
        )
        sums = no_sums
        for number in tl.static_range(COLUMNS // STRIP):
            group = grid[group_of_strip(number, COLUMNS, GROUP_SIZE)]
            of_words = spread(group, PART_WORDS // 4)
            codes = strip_codes(words, of_words, offset, number, BITS, X_TYPE)
            codes = deal_pairs(codes, WIDTH, X_TYPE)
            columns = block * COLUMNS + number * STRIP
            added = ()
            for part in tl.static_range(PARTS):
                if IS_PADDED:
                    is_column = columns + strip_columns < in_features
                    x = tl.load(x_starts[part] + columns, mask=is_column, other=0)
                else:
                    x = tl.load(x_starts[part] + columns)
                added += (tl.dot(codes, deal(x, WIDTH).trans(), sums[part]),)
            sums = added
            if ends_group(number, COLUMNS, GROUP_SIZE):
                # Fewer sums than weights are to be scaled.
                scales = spread(high_half(group, DTYPE), 2)
                added = ()
                for part in tl.static_range(PARTS):
                    added += (tl.fma(sums[part], scales, totals[part]),)
                totals = added
                sums = no_sums
        words, grid = next_words, next_grid

    for part in tl.static_range(PARTS):
        token = part * 8 + eight[None, :]
        total = totals[part]
        if IS_SPLIT:
            store_sums(sums_ptr, total, split, rows, token, tokens, out_features)
        else:
            store(out_ptr, bias_ptr, total, rows, token, tokens, out_features, HAS_BIAS)
    if IS_SPLIT:
        add_up(
            counters_ptr + row_block * COUNTERS,
            sums_ptr,
            bias_ptr,
            out_ptr,
            row_block,
            0,
            tokens,
            out_features,
            splits,
            tl.load(job_starts_ptr + row_block),
            tl.load(job_starts_ptr + row_block + 1),
            HAS_BIAS,
            ROWS,
            TOKENS,
            8,
        )
