"""A block of a tiled weight: loading it, and its slices as tensor cores take them."""

import triton
import triton.language as tl

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
def dealt_columns(WIDTH: tl.constexpr):
    """The column that `deal` takes for each: int32 [32]."""
    dealt = tl.arange(0, 32)
    if WIDTH == 2:
        thread, pair = dealt // 2 % 4, dealt // 16 * 2 + dealt // 8 % 2
    else:
        thread, pair = dealt // 4 % 4, dealt // 2 % 2 * 2 + dealt // 16
    return thread * 8 + pair * 2 + dealt % 2


@triton.jit
def code_places(
    qweight_ptr,
    qweight_high_ptr,
    rows,
    blocks,
    BLOCK_WORDS: tl.constexpr,
    BITS: tl.constexpr,
):
    """Where the first block of rows [n, 1] has its words, for `load_words`."""
    HALF: tl.constexpr = BLOCK_WORDS // 2
    code_rows = rows * blocks
    half_words = tl.arange(0, HALF)[None, :]
    low_ptr = qweight_ptr + code_rows * BLOCK_WORDS + half_words
    high_ptr = low_ptr
    if BITS == 3:
        high_ptr = qweight_high_ptr + code_rows * HALF + half_words
    return low_ptr, high_ptr


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


@triton.jit
def half_slice(
    low,
    high,
    grid,
    offset,
    FIELD: tl.constexpr,
    HALF: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
    WIDTH: tl.constexpr,
    DTYPE: tl.constexpr,
    X_TYPE: tl.constexpr,
):
    """Weights [ROWS, 32] of half a slice, dealt: `low` and `high` are its words.

    `grid` is of the whole block, `offset` is `offset_words`.
    """
    SLICE: tl.constexpr = 2 * BLOCK_WORDS
    COLUMNS: tl.constexpr = (4 if BITS == 4 else 8) * SLICE
    FIRST: tl.constexpr = FIELD * SLICE + HALF * (SLICE // 2)
    group = grid[group_in_block(FIRST, COLUMNS, GROUP_SIZE)]
    zeros = negative_zeros(group, offset, FIELD, BITS)[:, None]
    scales = scale_pairs(group, FIELD, BITS, DTYPE, X_TYPE)[:, None]
    words = slice_words(low, high, offset, FIELD, BITS)
    words = pair_weights(words, zeros, scales, X_TYPE)
    return deal(value_pairs(words, X_TYPE), WIDTH)
