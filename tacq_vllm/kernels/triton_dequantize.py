"""A packed weight as a dense one in 16 bits, for products with very many tokens."""

import triton
import triton.language as tl

from tacq_vllm.kernels.triton_codes import add_entries, load_weight


@triton.jit
def dequantize_kernel(
    qweight_ptr,
    qweight_high_ptr,
    scales_ptr,
    qzeros_ptr,
    qzeros_high_ptr,
    outliers_ptr,
    out_ptr,
    first_row,
    last_row,
    out_features,
    in_features,
    num_words,
    num_groups,
    GROUP_WORDS: tl.constexpr,
    BITS: tl.constexpr,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """Write rows [first_row, last_row) of W to out; the grid is (rows / ROWS,).

    `first_row` is a multiple of ROWS. A program writes whole rows, then adds their kept
    weights.
    """
    WIDTH: tl.constexpr = 4 if BITS == 4 else 2
    PER_WORD: tl.constexpr = 32 // WIDTH
    block = first_row // ROWS + tl.program_id(0)
    rows = block * ROWS + tl.arange(0, ROWS)
    fields = tl.arange(0, PER_WORD)[None, None, :]
    is_row = rows < last_row
    out_rows = out_ptr + (rows - first_row).to(tl.int64) * in_features

    for start in range(0, num_words, WORDS):
        words = start + tl.arange(0, WORDS)
        mask = is_row[:, None] & (words < num_words)[None, :]
        weight = load_weight(
            qweight_ptr,
            qweight_high_ptr,
            scales_ptr,
            qzeros_ptr,
            qzeros_high_ptr,
            rows[:, None],
            words[None, :],
            mask,
            num_words,
            num_groups,
            GROUP_WORDS,
            BITS,
        )
        columns = words[None, :, None] * PER_WORD + fields
        tl.store(
            out_rows[:, None, None] + columns,
            weight.to(out_ptr.dtype.element_ty),
            mask=is_row[:, None, None] & (columns < in_features),
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
