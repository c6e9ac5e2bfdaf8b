"""A batch of tokens times a tiled weight on tensor cores.

A program is several warps, each with a block of rows of its own. Threads make operands
of the words that they have loaded, as in `triton_tile_gemm`: nothing is exchanged
between them but x, which all warps share. It is transposed first, so that what kept
weights are multiplied with lies together. Where columns are split, programs leave their
sums in a workspace, and the last one of the same rows adds them up in their order.
"""

import triton
import triton.language as tl

from tacq_vllm.kernels.triton_tile_blocks import (
    code_places,
    deal_pairs,
    dealt_columns,
    grid_places,
    load_block,
    row_share,
    strip_codes,
)
from tacq_vllm.kernels.triton_tile_codes import (
    SIGNS,
    STRIP,
    block_columns,
    group_of_strip,
    in_register,
    pair_fma,
    scale_pairs,
)
from tacq_vllm.kernels.triton_tile_kept import add_kept_of_blocks
from tacq_vllm.kernels.triton_tile_sums import add_up, store, store_sums


@triton.jit
def deal_rows(values, WARPS: tl.constexpr):
    """Rows [16 · WARPS, n] in another order: a warp's are neighbours.

    A warp has loaded eight rows of either half, and tensor cores want sixteen that
    follow each other.
    """
    halves = values.reshape(2, WARPS, 8, values.shape[1])
    return halves.permute(1, 0, 2, 3).reshape(16 * WARPS, values.shape[1])


@triton.jit
def dealt_rows(WARPS: tl.constexpr):
    """The row that each of those loaded will be: int32 [16 · WARPS]."""
    loaded = tl.arange(0, 16 * WARPS)
    half, warp = loaded // (8 * WARPS), loaded // 8 % WARPS
    return warp * 16 + half * 8 + loaded % 8


@triton.jit(do_not_specialize=["tokens"])
def transpose_kernel(
    x_ptr,
    out_ptr,
    tokens,
    in_features,
    columns,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Transpose x [tokens, in]: out [tokens / TOKENS, columns, TOKENS].

    The grid is (columns / COLUMNS, tokens / TOKENS). What x does not have is 0.
    """
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    token = tl.arange(0, TOKENS)
    x_rows = (tl.program_id(1) * TOKENS + token)[:, None]
    mask = (x_rows < tokens) & (column[None, :] < in_features)
    x = tl.load(x_ptr + x_rows * in_features + column[None, :], mask=mask, other=0)
    out_rows = tl.program_id(1) * columns + column[:, None]
    mask = column[:, None] < columns
    tl.store(out_ptr + out_rows * TOKENS + token[None, :], x.trans(), mask=mask)


@triton.jit(do_not_specialize=["tokens", "blocks", "splits", "offset"])
def tile_batch_kernel(
    x_ptr,
    qweight_ptr,
    grid_ptr,
    starts_ptr,
    columns_ptr,
    segments_ptr,
    counters_ptr,
    bias_ptr,
    sums_ptr,
    out_ptr,
    tokens,
    out_features,
    blocks,
    splits,
    offset,
    GROUP_SIZE: tl.constexpr,
    BITS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    WARPS: tl.constexpr,
    TOKENS: tl.constexpr,
    STEP: tl.constexpr,
    COUNTERS: tl.constexpr,
    SEGMENT: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Multiply x [tokens / TOKENS, columns of all blocks, TOKENS]: out [tokens, out].

    The grid is (multiprocessors, turns, tokens / TOKENS); a program has WARPS blocks of
    rows, and a split adds up its share of the blocks of columns and of kept weights.
    Sums are [splits, tokens, out]; with one split, IS_SPLIT is false. `offset` is
    `offset_words`, GROUP_SIZE is 0 for groups that are whole rows; WIDTH is of `deal`,
    STEP of `add_up`.
    """
    COLUMNS: tl.constexpr = block_columns(BITS)
    STRIPS: tl.constexpr = COLUMNS // STRIP
    ROWS: tl.constexpr = WARPS * BLOCK_ROWS
    X_TYPE: tl.constexpr = x_ptr.dtype.element_ty
    offset = in_register(offset)
    row_block, split = row_share(tl.program_id(1), splits)
    if row_block * ROWS >= out_features:
        return
    # What is past the last row or token is computed of the last one, and not stored.
    loaded = tl.minimum(row_block * ROWS + dealt_rows(WARPS), out_features - 1)
    code_ptr = code_places(qweight_ptr, loaded[:, None], blocks, BITS)
    groups = blocks * COLUMNS // GROUP_SIZE if GROUP_SIZE > 0 else 1
    grid_rows = grid_places(grid_ptr, loaded, groups, BLOCK_ROWS)
    x_ptr += tl.program_id(2) * (blocks * (COLUMNS * TOKENS))
    x_rows = x_ptr + dealt_columns(WIDTH)[:, None] * TOKENS
    x_rows += tl.arange(0, TOKENS)[None, :]

    first_block = split * blocks // splits
    last_block = (split + 1) * blocks // splits
    words, grid = load_block(
        code_ptr, grid_rows, first_block, GROUP_SIZE, BITS, BLOCK_ROWS
    )
    x = tl.load(x_rows + first_block * (COLUMNS * TOKENS))
    total = add_kept_of_blocks(
        tl.zeros([ROWS, TOKENS], tl.float32),
        x_ptr,
        starts_ptr,
        columns_ptr,
        segments_ptr,
        row_block * WARPS,
        tl.cdiv(out_features, BLOCK_ROWS),
        split,
        splits,
        WARPS,
        SEGMENT,
        DTYPE,
    )
    for block in range(first_block, last_block):
        # The next block, and the next x, are asked for before these are multiplied.
        next_block = tl.minimum(block + 1, last_block - 1)
        next_words, next_grid = load_block(
            code_ptr, grid_rows, next_block, GROUP_SIZE, BITS, BLOCK_ROWS
        )
        for number in tl.static_range(STRIPS):
            if number < STRIPS - 1:
                columns = block * COLUMNS + (number + 1) * STRIP
            else:
                columns = next_block * COLUMNS
            next_x = tl.load(x_rows + columns * TOKENS)
            group = grid[group_of_strip(number, COLUMNS, GROUP_SIZE)][:, None]
            codes = strip_codes(words, group, offset, number, BITS, X_TYPE)
            scales = scale_pairs(group, DTYPE, X_TYPE)
            # Rounded once, to the type of x.
            weights = pair_fma(codes, scales, SIGNS, X_TYPE)
            weights = deal_rows(deal_pairs(weights, WIDTH, X_TYPE), WARPS)
            total = tl.dot(weights, x, total)
            x = next_x
        words, grid = next_words, next_grid

    first_token = tl.program_id(2) * TOKENS
    token = first_token + tl.arange(0, TOKENS)[None, :]
    rows = row_block * ROWS + tl.arange(0, ROWS)[:, None]
    if IS_SPLIT:
        store_sums(sums_ptr, total, split, rows, token, tokens, out_features)
        add_up(
            counters_ptr + row_block * (WARPS * COUNTERS) + tl.program_id(2),
            sums_ptr,
            bias_ptr,
            out_ptr,
            row_block,
            first_token,
            tokens,
            out_features,
            splits,
            0,
            0,
            HAS_BIAS,
            ROWS,
            TOKENS,
            STEP,
        )
    else:
        store(out_ptr, bias_ptr, total, rows, token, tokens, out_features, HAS_BIAS)
