"""A weight of clusters as a dense one in 16 bits, for products with many tokens."""

import triton
import triton.language as tl

from tacq_vllm.kernels.triton_cluster_codes import (
    cluster_entries,
    entry_code,
    half_indices,
    half_word,
)
from tacq_vllm.kernels.triton_codes import add_entries, load_scales


@triton.jit
def cluster_dequantize_kernel(
    qweight_ptr,
    scales_ptr,
    outliers_ptr,
    table_ptr,
    out_ptr,
    first_row,
    last_row,
    out_features,
    in_features,
    num_words,
    num_groups,
    group_halves,
    ROWS: tl.constexpr,
    HALVES: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """Write rows [first_row, last_row) of W to out; the grid is (rows / ROWS,).

    `first_row` is a multiple of ROWS. A program writes whole rows, then adds their kept
    weights.
    """
    block = first_row // ROWS + tl.program_id(0)
    rows = block * ROWS + tl.arange(0, ROWS)
    is_row = rows < last_row
    out_rows = out_ptr + (rows - first_row).to(tl.int64) * in_features
    clusters = tl.arange(0, 16)[None, None, :]
    number = 6 * clusters // 32
    row = rows[:, None, None]
    num_halves = num_words // 7 * 2

    for start in range(0, num_halves, HALVES):
        half = (start + tl.arange(0, HALVES))[None, :, None]
        mask = is_row[:, None, None] & (half < num_halves)
        low = half_word(qweight_ptr, row, half, number, num_words, mask)
        next_number = tl.minimum(number + 1, 2)
        high = half_word(qweight_ptr, row, half, next_number, num_words, mask)
        indices = half_indices(qweight_ptr, row, half, num_words, mask)
        entries = cluster_entries(
            table_ptr, low, high, 6 * clusters % 32, indices, clusters // 2
        )
        scales = load_scales(scales_ptr, row, half // group_halves, num_groups, mask)
        for place in tl.static_range(3):
            columns = half * 48 + 3 * clusters + place
            weight = entry_code(entries, place) * scales
            tl.store(
                out_rows[:, None, None] + columns,
                weight.to(out_ptr.dtype.element_ty),
                mask=mask & (columns < in_features),
            )

    add_entries(
        out_rows,
        outliers_ptr,
        block,
        is_row,
        out_features,
        scales_ptr.dtype.element_ty,
        ROWS,
        ENTRIES,
    )
