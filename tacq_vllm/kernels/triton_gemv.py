"""One token times a packed weight: codes, scales and kept weights in one launch.

A program owns some rows and all their columns, so nothing is added across programs and
the same inputs give the same bits; its warps share the columns. Within a word the codes
are multiplied with x without scale or zero-point, which come once a word:

    Σ (code - zero) · scale · x = scale · (Σ value · unit · x - Σ unit · x - zero · Σ x)

with `value` and `unit` of triton_codes.
"""

import triton
import triton.language as tl

from tacq_vllm.kernels.triton_codes import (
    entries_of_rows,
    field_unit,
    field_value,
    load_entries,
    load_high,
    load_scales,
    load_zeros,
)


@triton.jit(do_not_specialize=["one"])
def gemv_kernel(
    x_ptr,
    qweight_ptr,
    qweight_high_ptr,
    scales_ptr,
    qzeros_ptr,
    qzeros_high_ptr,
    outliers_ptr,
    bias_ptr,
    out_ptr,
    out_features,
    in_features,
    num_words,
    num_groups,
    one,
    GROUP_WORDS: tl.constexpr,
    BITS: tl.constexpr,
    EXACT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """Multiply x [in]: out [out]; the grid is (out / ROWS,).

    `one` is 1 (see `field_value`). EXACT takes the 1 out of every value before it is
    multiplied, for x in float32.
    """
    WIDTH: tl.constexpr = 4 if BITS == 4 else 2
    PER_WORD: tl.constexpr = 32 // WIDTH
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = rows < out_features

    sums = tl.zeros([ROWS, WORDS], tl.float32)
    for start in range(0, num_words, WORDS):
        words = tl.max_contiguous(start + tl.arange(0, WORDS), 1)
        mask = is_row[:, None] & (words < num_words)[None, :]
        low = tl.load(
            qweight_ptr + rows[:, None] * num_words + words[None, :], mask=mask, other=0
        )
        if BITS == 3:
            high = load_high(
                qweight_high_ptr, rows[:, None], words[None, :], num_words, mask
            )
        dots = tl.zeros([ROWS, WORDS], tl.float32)
        ones = tl.zeros([WORDS], tl.float32)
        x_sums = tl.zeros([WORDS], tl.float32)
        for field in tl.static_range(PER_WORD):
            columns = words * PER_WORD + field
            x = tl.load(x_ptr + columns, mask=columns < in_features, other=0)
            x = x.to(tl.float32)
            x_sums += x
            value = field_value(low, one, field, WIDTH)
            scaled = x * field_unit(field, WIDTH)
            if EXACT:
                value -= 1.0
            else:
                ones += scaled
            dots += value * scaled[None, :]
            if BITS == 3:
                value = field_value(high, one, field, 1)
                scaled = x * (4 * field_unit(field, 1))
                if EXACT:
                    value -= 1.0
                else:
                    ones += scaled
                dots += value * scaled[None, :]
        groups = (words // GROUP_WORDS)[None, :]
        scales = load_scales(scales_ptr, rows[:, None], groups, num_groups, mask)
        zeros = load_zeros(
            qzeros_ptr, qzeros_high_ptr, rows[:, None], groups, num_groups, mask, BITS
        )
        sums += scales * (dots - ones[None, :] - zeros * x_sums[None, :])
    result = tl.sum(sums, axis=1)

    first, last = entries_of_rows(outliers_ptr, tl.program_id(0), ROWS, out_features)
    for start in range(first, last, ENTRIES):
        columns, _, kept = load_entries(
            outliers_ptr,
            start,
            ENTRIES,
            rows,
            out_features,
            scales_ptr.dtype.element_ty,
        )
        x = tl.load(x_ptr + columns).to(tl.float32)
        result += tl.sum(kept * x[None, :], axis=1)

    if HAS_BIAS:
        result += tl.load(bias_ptr + rows, mask=is_row, other=0).to(tl.float32)
    tl.store(out_ptr + rows, result.to(out_ptr.dtype.element_ty), mask=is_row)
