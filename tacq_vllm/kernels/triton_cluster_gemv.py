"""A few tokens times a weight of clusters, in one launch.

A program owns some rows and all their columns, so nothing is added across programs and
the same inputs give the same bits; its warps share the columns.
"""

import triton
import triton.language as tl

from tacq_vllm.kernels.triton_cluster_codes import (
    cluster_entries,
    entry_code,
    half_indices,
    half_word,
)
from tacq_vllm.kernels.triton_codes import entries_of_rows, load_entries, load_scales


@triton.jit
def cluster_gemv_kernel(
    x_ptr,
    qweight_ptr,
    scales_ptr,
    outliers_ptr,
    table_ptr,
    bias_ptr,
    out_ptr,
    tokens,
    out_features,
    in_features,
    num_words,
    num_groups,
    group_halves,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    HALVES: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """Multiply x [tokens, in], at most TOKENS: out [tokens, out].

    The grid is (out / ROWS,).
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    numbers = tl.arange(0, TOKENS)
    is_row, is_token = rows < out_features, numbers < tokens
    x_starts = x_ptr + numbers[None, :] * in_features
    num_halves = num_words // 7 * 2

    sums = tl.zeros([ROWS, HALVES, TOKENS], tl.float32)
    for start in range(0, num_halves, HALVES):
        halves = start + tl.arange(0, HALVES)
        mask = is_row[:, None] & (halves < num_halves)[None, :]
        row, half = rows[:, None], halves[None, :]
        first = half_word(qweight_ptr, row, half, 0, num_words, mask)
        second = half_word(qweight_ptr, row, half, 1, num_words, mask)
        third = half_word(qweight_ptr, row, half, 2, num_words, mask)
        indices = half_indices(qweight_ptr, row, half, num_words, mask)
        dots = tl.zeros([ROWS, HALVES, TOKENS], tl.float32)
        for cluster in tl.static_range(16):
            low = first if cluster < 6 else (second if cluster < 11 else third)
            high = second if cluster < 10 else third
            entries = cluster_entries(
                table_ptr, low, high, 6 * cluster % 32, indices, cluster // 2
            )
            for place in tl.static_range(3):
                columns = halves * 48 + 3 * cluster + place
                x = tl.load(
                    x_starts + columns[:, None],
                    mask=(columns < in_features)[:, None] & is_token[None, :],
                    other=0,
                ).to(tl.float32)
                dots += entry_code(entries, place)[:, :, None] * x[None, :, :]
        scales = load_scales(scales_ptr, row, half // group_halves, num_groups, mask)
        sums += scales[:, :, None] * dots
    result = tl.sum(sums, axis=1)

    first_entry, last_entry = entries_of_rows(
        outliers_ptr, tl.program_id(0), ROWS, out_features
    )
    for start in range(first_entry, last_entry, ENTRIES):
        columns, _, kept = load_entries(
            outliers_ptr,
            start,
            ENTRIES,
            rows,
            out_features,
            scales_ptr.dtype.element_ty,
        )
        x = tl.load(x_starts + columns[:, None], mask=is_token[None, :], other=0)
        result += tl.sum(kept[:, :, None] * x.to(tl.float32)[None, :, :], axis=1)

    if HAS_BIAS:
        bias = tl.load(bias_ptr + rows, mask=is_row, other=0).to(tl.float32)
        result += bias[:, None]
    tl.store(
        out_ptr + numbers[None, :] * out_features + rows[:, None],
        result.to(out_ptr.dtype.element_ty),
        mask=is_row[:, None] & is_token[None, :],
    )
