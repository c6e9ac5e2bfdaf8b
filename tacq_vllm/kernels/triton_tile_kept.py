"""Kept weights of a tiled weight times some tokens, on tensor cores.

They stand in a matrix of their block's rows, one in each column, which is multiplied
with x at their columns.
"""

import triton
import triton.language as tl

from tacq_vllm.kernels.triton_codes import high_half
from tacq_vllm.kernels.triton_tile_codes import entry_columns, entry_rows


@triton.jit
def deal_halves(first, second, WIDTH: tl.constexpr):
    """What `triton_tile_blocks.deal` makes of columns [n, 16] and the next 16."""
    both = tl.join(
        first.reshape(first.shape[0], 4, 2, 2), second.reshape(first.shape[0], 4, 2, 2)
    )
    both = both.permute((0, 4, 2, 1, 3) if WIDTH == 2 else (0, 4, 1, 2, 3))
    return both.reshape(first.shape[0], 32)


@triton.jit
def kept_rows(words, DTYPE: tl.constexpr):
    """Kept weights, [8, n] that are all alike, in the rows they are of: [16, n]."""
    owners, values = entry_rows(words), high_half(words, DTYPE)
    rows = tl.arange(0, 8)[:, None]
    first = tl.where(owners == rows, values, 0)
    second = tl.where(owners == rows + 8, values, 0)
    return tl.join(first, second).permute(2, 0, 1).reshape(16, words.shape[1])


@triton.jit
def gather(x_rows, words, panel):
    """Load x [8, 16] of tokens that begin at `x_rows` [1, 8, 1], at entries' columns.

    It is loaded as [4, 8, 4]: that is how Triton comes to give a thread the x of those
    entries that it has.
    """
    columns = entry_columns(words, panel).reshape(8, 4, 4).permute(1, 0, 2)
    return tl.load(x_rows + columns).permute(1, 0, 2).reshape(8, 16)


@triton.jit
def load_segments(
    columns_ptr, segments_ptr, start, last, STEP: tl.constexpr, SEGMENT: tl.constexpr
):
    """Load STEP segments, for `add_kept`: of each both halves' words, and its panel.

    Words are int32 [8, SEGMENT / 2]; those of segments from `last` on are 0.
    """
    # Every row's thread loads the same ones.
    zeros = tl.arange(0, 8)[:, None] * 0
    entries = zeros + tl.arange(0, SEGMENT // 2)[None, :]
    loaded = ()
    for number in tl.static_range(STEP):
        segment = start + number
        is_segment = zeros + segment < last
        places = segments_ptr + segment * SEGMENT + entries
        words = tl.load(places, mask=is_segment, other=0)
        next_words = tl.load(places + SEGMENT // 2, mask=is_segment, other=0)
        panel = tl.load(columns_ptr + segment, mask=segment < last, other=0)
        loaded += (words, next_words, panel)
    return loaded


@triton.jit
def add_kept(
    totals,
    kept,
    x_ptr,
    columns_ptr,
    segments_ptr,
    tokens,
    in_features,
    first,
    last,
    WIDTH: tl.constexpr,
    STEP: tl.constexpr,
    SEGMENT: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Add kept weights of segments times x to sums, [16, 8] for eight tokens each.

    `kept` are the first of them, from `load_segments`.
    """
    X_TYPE: tl.constexpr = x_ptr.dtype.element_ty
    for start in range(first, last, STEP):
        # The next segments are asked for before these are multiplied.
        next_kept = load_segments(
            columns_ptr, segments_ptr, start + STEP, last, STEP, SEGMENT
        )
        for number in tl.static_range(STEP):
            words, next_words = kept[3 * number], kept[3 * number + 1]
            panel = kept[3 * number + 2]
            weights = deal_halves(
                kept_rows(words, DTYPE), kept_rows(next_words, DTYPE), WIDTH
            )
            added = ()
            for part in tl.static_range(len(totals)):
                token = part * 8 + tl.arange(0, 8)
                x_rows = x_ptr + tl.minimum(token, tokens - 1) * in_features
                x_rows = x_rows[None, :, None]
                x = deal_halves(
                    gather(x_rows, words, panel),
                    gather(x_rows, next_words, panel),
                    WIDTH,
                ).trans()
                # Which of them are in which row, as a product that loses nothing.
                total = totals[part]
                if DTYPE == X_TYPE:
                    total = tl.dot(weights.to(X_TYPE), x, total)
                else:
                    x = x.to(tl.float32)
                    total = tl.dot(weights, x, total, input_precision="tf32x3")
                added += (total,)
            totals = added
        kept = next_kept
    return totals


@triton.jit
def load_entries(
    columns_ptr, segments_ptr, segment, last, STEP: tl.constexpr, SEGMENT: tl.constexpr
):
    """Load STEP segments: their words, panels and numbers, int32 [STEP · SEGMENT].

    Words of segments from `last` on are 0.
    """
    entries = tl.arange(0, STEP * SEGMENT)
    numbers = segment + entries // SEGMENT
    is_entry = numbers < last
    places = segments_ptr + segment * SEGMENT + entries
    words = tl.load(places, mask=is_entry, other=0)
    return words, tl.load(columns_ptr + numbers, mask=is_entry, other=0), numbers


@triton.jit
def add_kept_of_blocks(
    total,
    x_ptr,
    starts_ptr,
    columns_ptr,
    segments_ptr,
    first_block,
    blocks,
    split,
    splits,
    BLOCKS: tl.constexpr,
    SEGMENT: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Add a split's share of the kept weights of several blocks of rows times x.

    Sums are [BLOCKS · 16, TOKENS], x is [in, TOKENS].
    """
    X_TYPE: tl.constexpr = x_ptr.dtype.element_ty
    TOKENS: tl.constexpr = total.shape[1]
    STEP: tl.constexpr = 2
    start = tl.load(starts_ptr + first_block)
    count = tl.load(starts_ptr + tl.minimum(first_block + BLOCKS, blocks)) - start
    first = start + count * split // splits
    last = start + count * (split + 1) // splits
    rows = tl.arange(0, 16 * BLOCKS)[:, None]
    x_ptr += tl.arange(0, TOKENS)[None, :]
    words, panels, numbers = load_entries(
        columns_ptr, segments_ptr, first, last, STEP, SEGMENT
    )
    for segment in range(first, last, STEP):
        # The next segments are asked for before these are multiplied.
        next_words, next_panels, next_numbers = load_entries(
            columns_ptr, segments_ptr, segment + STEP, last, STEP, SEGMENT
        )
        owners = entry_rows(words)
        for number in tl.static_range(1, BLOCKS):
            start = tl.load(starts_ptr + tl.minimum(first_block + number, blocks))
            owners += (numbers >= start).to(tl.int32) * 16
        values = high_half(words, DTYPE)
        weights = tl.where(rows == owners[None, :], values[None, :], 0)
        x = tl.load(x_ptr + entry_columns(words, panels)[:, None] * TOKENS)
        if DTYPE == X_TYPE:
            total = tl.dot(weights.to(X_TYPE), x, total)
        else:
            x = x.to(tl.float32)
            total = tl.dot(weights, x, total, input_precision="tf32x3")
        words, panels, numbers = next_words, next_panels, next_numbers
    return total
