"""Several tokens times a packed weight, on tensor cores.

A tile of codes becomes weights in the type of x, exactly (code - zero) · scale before
they are rounded, and is multiplied at once. Kept weights are multiplied the same way:
some of them, each in its row, make a tile, and their columns of x the other.
"""

import triton
import triton.language as tl

from tacq_vllm.kernels.triton_codes import (
    entries_of_rows,
    load_entries,
    load_weight,
)


@triton.jit(do_not_specialize=["tokens"])
def gemm_kernel(
    x_ptr,
    qweight_ptr,
    qweight_high_ptr,
    scales_ptr,
    qzeros_ptr,
    qzeros_high_ptr,
    outliers_ptr,
    bias_ptr,
    out_ptr,
    tokens,
    out_features,
    in_features,
    num_words,
    num_groups,
    split_words,
    GROUP_WORDS: tl.constexpr,
    BITS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    WORDS: tl.constexpr,
    ENTRIES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Multiply x [tokens, in]: out [splits, tokens, out].

    The grid is (out / ROWS, tokens / TOKENS, splits): a split adds up `split_words`
    words of its rows, and its share of their kept weights.
    """
    WIDTH: tl.constexpr = 4 if BITS == 4 else 2
    PER_WORD: tl.constexpr = 32 // WIDTH
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    numbers = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    split, splits = tl.program_id(2), tl.num_programs(2)
    is_row, is_token = rows < out_features, numbers < tokens
    x_starts = x_ptr + numbers[None, :] * in_features
    x_type = x_ptr.dtype.element_ty

    sums = tl.zeros([ROWS, TOKENS], tl.float32)
    first_word = split * split_words
    last_word = tl.minimum(first_word + split_words, num_words)
    last_column = tl.minimum(last_word * PER_WORD, in_features)
    for start in range(first_word, last_word, WORDS):
        words = start + tl.arange(0, WORDS)
        weight = load_weight(
            qweight_ptr,
            qweight_high_ptr,
            scales_ptr,
            qzeros_ptr,
            qzeros_high_ptr,
            rows[:, None],
            words[None, :],
            is_row[:, None] & (words < last_word)[None, :],
            num_words,
            num_groups,
            GROUP_WORDS,
            BITS,
        ).reshape(ROWS, WORDS * PER_WORD)
        columns = start * PER_WORD + tl.arange(0, WORDS * PER_WORD)
        x = tl.load(
            x_starts + columns[:, None],
            mask=(columns < last_column)[:, None] & is_token[None, :],
            other=0,
        )
        sums = tl.dot(weight.to(x_type), x, sums, input_precision=PRECISION)

    first, last = entries_of_rows(outliers_ptr, tl.program_id(0), ROWS, out_features)
    for start in range(first + split * ENTRIES, last, splits * ENTRIES):
        columns, _, kept = load_entries(
            outliers_ptr,
            start,
            ENTRIES,
            rows,
            out_features,
            scales_ptr.dtype.element_ty,
        )
        x = tl.load(x_starts + columns[:, None], mask=is_token[None, :], other=0)
        sums = tl.dot(kept.to(x_type), x, sums, input_precision=PRECISION)

    if HAS_BIAS:
        sums += tl.load(bias_ptr + rows, mask=is_row, other=0).to(tl.float32)[:, None]
    place = (split * tokens + numbers).to(tl.int64)[None, :] * out_features
    tl.store(
        out_ptr + place + rows[:, None],
        sums.to(out_ptr.dtype.element_ty),
        mask=is_row[:, None] & is_token[None, :],
    )
