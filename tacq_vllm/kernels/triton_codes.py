"""Reading packed codes in Triton: what the GPU kernels share.

A code becomes a float without a conversion: a byte of a word is shifted into the
mantissa, one field of it is masked out and the exponent of 1.0 put in front, which
gives 1 + code · step with a step that depends on the field's place in its byte alone.
That is one integer instruction for a field and one for every byte. Shifting by bytes,
no further, keeps 1 and the code within ten bits of each other: float32 loses nothing
that a 16-bit result shows.
"""

import triton
import triton.language as tl

_FIRST_BIT = 14
"""Where in the mantissa of 23 bits the byte begins."""


@triton.constexpr_function
def field_shift(field, width):
    """How far left a word is shifted for one of its fields."""
    return _FIRST_BIT - field * width // 8 * 8


@triton.constexpr_function
def field_mask(field, width):
    """Where the field is after that."""
    return ((1 << width) - 1) << _FIRST_BIT + field * width % 8


@triton.constexpr_function
def field_unit(field, width):
    """What the code part of `field_value` is to be multiplied with."""
    return 2.0 ** (23 - _FIRST_BIT - field * width % 8)


@triton.jit
def field_value(word, one, FIELD: tl.constexpr, WIDTH: tl.constexpr):
    """1 + code / field_unit: one field of words, as float32 of the same shape.

    `one` is 1, but the compiler must not know: from constants that it knows it makes
    operands anew for every instruction, in a fifth of all instructions.
    """
    SHIFT: tl.constexpr = field_shift(FIELD, WIDTH)
    moved = word << SHIFT if SHIFT >= 0 else word >> -SHIFT
    bits = (moved & (one * field_mask(FIELD, WIDTH))) | (one * 0x3F800000)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def load_high(high_ptr, rows, words, num_words, mask):
    """The 16 bits of the high plane that belong to words of the low one."""
    high_words = tl.load(
        high_ptr + rows * ((num_words + 1) // 2) + words // 2, mask=mask, other=0
    )
    return high_words >> (words % 2 * 16)


@triton.jit
def load_zeros(zeros_ptr, high_ptr, rows, groups, num_groups, mask, BITS: tl.constexpr):
    """Zero-points of rows and groups, as float32 of the mask's shape."""
    WIDTH: tl.constexpr = 4 if BITS == 4 else 2
    PER_WORD: tl.constexpr = 32 // WIDTH
    word = tl.load(
        zeros_ptr + rows // PER_WORD * num_groups + groups, mask=mask, other=0
    )
    zero = word >> (rows % PER_WORD * WIDTH) & ((1 << WIDTH) - 1)
    if BITS == 3:
        word = tl.load(high_ptr + rows // 32 * num_groups + groups, mask=mask, other=0)
        zero += (word >> (rows % 32) & 1) * 4
    return zero.to(tl.float32)


@triton.jit
def load_scales(scales_ptr, rows, groups, num_groups, mask):
    """Scales of rows and groups, as float32 of the mask's shape."""
    scales = tl.load(scales_ptr + rows * num_groups + groups, mask=mask, other=0)
    return scales.to(tl.float32)


@triton.jit
def entries_of_rows(outliers_ptr, block, ROWS: tl.constexpr, out_features):
    """The first entry of a block of rows in the outlier table, and the one after."""
    first = tl.load(outliers_ptr + block * ROWS)
    last = tl.load(outliers_ptr + tl.minimum((block + 1) * ROWS, out_features))
    return first, last


@triton.jit
def high_half(words, DTYPE: tl.constexpr):
    """The 16-bit number in the high half of words, as float32."""
    if DTYPE.is_bf16():
        return (words & -65536).to(tl.float32, bitcast=True)
    else:
        return (words >> 16).to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)


@triton.jit
def load_entries(
    outliers_ptr,
    start,
    ENTRIES: tl.constexpr,
    rows,
    out_features,
    DTYPE: tl.constexpr,
):
    """Entries of a block of rows from one on, however they are spread over the rows.

    Returns:
        int32 columns [ENTRIES]; whose they are, bool [rows, ENTRIES]; and the kept
        values there, float32 [rows, ENTRIES], 0 elsewhere. Past the block's last entry
        columns are 0 and no row's.
    """
    entries = start + tl.arange(0, ENTRIES)
    is_row = rows < out_features
    starts = tl.load(outliers_ptr + rows, mask=is_row, other=0)
    ends = tl.load(outliers_ptr + rows + 1, mask=is_row, other=0)
    owned = (entries[None, :] >= starts[:, None]) & (entries[None, :] < ends[:, None])
    words = tl.load(
        outliers_ptr + out_features + 1 + entries,
        mask=entries < tl.max(ends, axis=0),
        other=0,
    )
    values = high_half(words, DTYPE)
    return words & 0xFFFF, owned, tl.where(owned, values[None, :], 0.0)


@triton.jit
def add_entries(
    out_rows,
    outliers_ptr,
    block,
    is_row,
    out_features,
    DTYPE: tl.constexpr,
    ROWS: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """Add the kept weights of a block of rows to dense rows that it has stored.

    `out_rows` are where rows begin, `is_row` which of them exist; DTYPE is the type of
    the kept values.
    """
    # What other threads have stored is read back.
    tl.debug_barrier()
    rows = block * ROWS + tl.arange(0, ROWS)
    first, last = entries_of_rows(outliers_ptr, block, ROWS, out_features)
    for start in range(first, last, ENTRIES):
        columns, owned, kept = load_entries(
            outliers_ptr, start, ENTRIES, rows, out_features, DTYPE
        )
        places = out_rows[:, None] + columns[None, :]
        mask = owned & is_row[:, None]
        weight = tl.load(places, mask=mask, other=0).to(tl.float32) + kept
        tl.store(places, weight.to(out_rows.dtype.element_ty), mask=mask)


@triton.jit
def load_weight(
    qweight_ptr,
    qweight_high_ptr,
    scales_ptr,
    qzeros_ptr,
    qzeros_high_ptr,
    rows,
    words,
    mask,
    num_words,
    num_groups,
    GROUP_WORDS: tl.constexpr,
    BITS: tl.constexpr,
):
    """(code - zero) · scale of rows [n, 1] and words [1, k]: float32 [n, k, fields].

    An integer put into the mantissa of 2**23 is a float without a conversion.
    """
    WIDTH: tl.constexpr = 4 if BITS == 4 else 2
    fields = tl.arange(0, 32 // WIDTH)[None, None, :]
    low = tl.load(qweight_ptr + rows * num_words + words, mask=mask, other=0)
    codes = low[:, :, None] >> (fields * WIDTH) & ((1 << WIDTH) - 1)
    if BITS == 3:
        high = load_high(qweight_high_ptr, rows, words, num_words, mask)
        codes |= (high[:, :, None] >> fields & 1) << 2
    values = (codes | 0x4B000000).to(tl.float32, bitcast=True)
    groups = words // GROUP_WORDS
    scales = load_scales(scales_ptr, rows, groups, num_groups, mask)
    zeros = load_zeros(
        qzeros_ptr, qzeros_high_ptr, rows, groups, num_groups, mask, BITS
    )
    return (values - (zeros + 8388608.0)[:, :, None]) * scales[:, :, None]
