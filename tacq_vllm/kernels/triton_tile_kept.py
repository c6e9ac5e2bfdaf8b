"""Kept weights of a tiled weight times some tokens, on tensor cores.

They stand in a matrix of their block's rows, one in each column, which is multiplied
with x at their columns.
"""

import triton
import triton.language as tl

from tacq_vllm.kernels.triton_codes import high_half
from tacq_vllm.kernels.triton_tile_blocks import deal, deal_pairs
from tacq_vllm.kernels.triton_tile_codes import (
    entry_columns,
    entry_rows,
    high_pairs,
    is_in_row,
)


@triton.jit
def kept_rows(words):
    """Kept weights, [8, n] of which each row is the same, in their rows: [16, n]."""
    rows = tl.arange(0, 8)[:, None]
    first = tl.where(is_in_row(words, rows), words, 0)
    second = tl.where(is_in_row(words, rows + 8), words, 0)
    return tl.join(first, second).permute(2, 0, 1).reshape(16, words.shape[1])


@triton.jit
def side_by_side(first, second):
    """Values [n, w] of threads and w more of each: [n, 2 · w]."""
    values = tl.join(first, second).permute(0, 2, 1)
    return values.reshape(first.shape[0], 2 * first.shape[1])


@triton.jit
def gather(x_rows, columns):
    """Load x [32, 4] at columns, of rows that begin at `x_rows` [32].

    A thread has one of the rows. It loads number by number, so that Triton does not
    give them to other threads.
    """
    even, odd = columns.reshape(32, 2, 2).split()
    first, third = even.split()
    second, fourth = odd.split()
    even = tl.join(tl.load(x_rows + first), tl.load(x_rows + third))
    odd = tl.join(tl.load(x_rows + second), tl.load(x_rows + fourth))
    return tl.join(even, odd).reshape(32, 4)


@triton.jit
def load_segments(
    columns_ptr, segments_ptr, start, last, STEP: tl.constexpr, SEGMENT: tl.constexpr
):
    """Load STEP segments, for `add_kept`: of each its words, in halves, and its panel.

    Words are int32 [32, 4]: of the 32 threads four that follow each other have a whole
    segment. Words of segments from `last` on are 0.
    """
    threads = tl.arange(0, 32)[:, None]
    entries = threads % 4 * 8 + tl.arange(0, 4)[None, :]
    loaded = ()
    for number in tl.static_range(STEP):
        segment = start + number
        is_segment = threads * 0 + segment < last
        places = segments_ptr + segment * SEGMENT + entries
        words = tl.load(places, mask=is_segment, other=0)
        next_words = tl.load(places + 4, mask=is_segment, other=0)
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
    # Of `deal`: of the same type in every version of Triton, unlike for codes.
    KEPT_WIDTH: tl.constexpr = 4 if DTYPE == X_TYPE else WIDTH
    for start in range(first, last, STEP):
        # The next segments are asked for before these are multiplied.
        next_kept = load_segments(
            columns_ptr, segments_ptr, start + STEP, last, STEP, SEGMENT
        )
        for number in tl.static_range(STEP):
            words, next_words = kept[3 * number], kept[3 * number + 1]
            panel = kept[3 * number + 2]
            rows = kept_rows(side_by_side(words, next_words).reshape(8, SEGMENT))
            added = ()
            for part in tl.static_range(len(totals)):
                token = tl.minimum(part * 8 + tl.arange(0, 32) // 4, tokens - 1)
                x_rows = x_ptr + token * in_features + panel
                x = side_by_side(
                    gather(x_rows, entry_columns(words)),
                    gather(x_rows, entry_columns(next_words)),
                )
                x = deal(x.reshape(8, SEGMENT), KEPT_WIDTH).trans()
                # Which of them are in which row, as a product that loses nothing.
                total = totals[part]
                if DTYPE == X_TYPE:
                    even, odd = rows.reshape(16, SEGMENT // 2, 2).split()
                    weights = deal_pairs(high_pairs(even, odd), KEPT_WIDTH, X_TYPE)
                    total = tl.dot(weights, x, total)
                else:
                    weights = deal(high_half(rows, DTYPE), KEPT_WIDTH)
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
        columns = panels + entry_columns(words)
        x = tl.load(x_ptr + columns[:, None] * TOKENS)
        if DTYPE == X_TYPE:
            total = tl.dot(weights.to(X_TYPE), x, total)
        else:
            x = x.to(tl.float32)
            total = tl.dot(weights, x, total, input_precision="tf32x3")
        words, panels, numbers = next_words, next_panels, next_numbers
    return total
