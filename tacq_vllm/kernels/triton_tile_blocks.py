"""A block of a tiled weight: loading it, and its strips as tensor cores take them."""

import triton
import triton.language as tl

from tacq_vllm.kernels.triton_tile_codes import (
    PART_WORDS,
    block_columns,
    block_words,
    first_group,
    groups_of_block,
    negative_zeros,
    pair_fma,
    place_of_strip,
    strip_words,
    unit_words,
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
def code_places(qweight_ptr, rows, blocks, BITS: tl.constexpr):
    """Where the first block of rows [n, 1] has its first part, for `load_block`."""
    row_words = blocks * block_words(BITS)
    return qweight_ptr + rows * row_words + tl.arange(0, PART_WORDS)[None, :]


@triton.jit
def grid_places(grid_ptr, rows, groups, ROWS: tl.constexpr):
    """Where rows have their first scale and zero-point, for `load_block`."""
    block, row = rows // ROWS, rows % ROWS
    place = row % (ROWS // 2) * 2 + row // (ROWS // 2)
    return grid_ptr + block * (groups * ROWS) + place


@triton.jit
def load_block(
    code_ptr,
    grid_ptr,
    block,
    GROUP_SIZE: tl.constexpr,
    BITS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """A block's words and its grid, int32 tuples.

    Words are [n, PART_WORDS] for each of its parts, the grid is as `grid_ptr` is for
    each group. Nobody else reads them: they do not go through the cache that x is in.
    """
    COLUMNS: tl.constexpr = block_columns(BITS)
    code_ptr += block * block_words(BITS)
    words = ()
    for part in tl.static_range(block_words(BITS) // PART_WORDS):
        words += (tl.load(code_ptr + part * PART_WORDS, cache_modifier=".cg"),)
    grid_ptr += first_group(block, COLUMNS, GROUP_SIZE) * ROWS
    grid = ()
    for number in tl.static_range(groups_of_block(COLUMNS, GROUP_SIZE)):
        grid += (tl.load(grid_ptr + number * ROWS, cache_modifier=".cg"),)
    return words, grid


@triton.jit
def strip_codes(
    words, group, offset, NUMBER: tl.constexpr, BITS: tl.constexpr, X_TYPE: tl.constexpr
):
    """Codes of a strip less their zero-points, exact, two in a word: [n, PART_WORDS].

    `words` are of the whole block, `group` is the grid of the strip's group, [n, 1] or
    for each word, `offset` is `offset_words`.
    """
    PLACE: tl.constexpr = place_of_strip(NUMBER, BITS)
    zeros = negative_zeros(group, offset, PLACE, X_TYPE)
    pairs = strip_words(words, offset, NUMBER, BITS)
    return pair_fma(pairs, unit_words(PLACE, X_TYPE), zeros, X_TYPE)


@triton.jit
def deal_pairs(pairs, WIDTH: tl.constexpr, X_TYPE: tl.constexpr):
    """The numbers of a strip, two in a word, dealt: [n, STRIP]."""
    return deal(value_pairs(pairs, X_TYPE), WIDTH)
