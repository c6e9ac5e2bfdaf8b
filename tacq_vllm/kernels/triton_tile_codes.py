"""Reading the codes of `tiles` in Triton: two weights with one mask.

A code goes into the mantissa of 128 in bfloat16, or of 1024 in float16, where it is a
number without a conversion, and without a shift too while it is within the last seven
bits: field 1 of a word then counts for 4 times its code, field 2 for 16 times. That,
and what the numbers are too large by, is taken out of the sums of a slice.
"""

import triton
import triton.language as tl

from tacq_vllm.kernels.triton_codes import high_half


@triton.constexpr_function
def fields_in_place(bits):
    """How many fields of a half are within the mantissa before it is shifted."""
    return 1 if bits == 4 else 3


@triton.constexpr_function
def field_unit(field, bits):
    """What the code part of a slice's values is to be multiplied with."""
    return 4.0 ** -(field % fields_in_place(bits))


@triton.constexpr_function
def value_offset(dtype):
    """What a slice's values are too large by."""
    return 128.0 if dtype.is_bf16() else 1024.0


@triton.constexpr_function
def offset_words(dtype):
    """That number in both halves of a word."""
    return 0x43004300 if dtype.is_bf16() else 0x64006400


@triton.jit
def slice_words(low, high, offset, FIELD: tl.constexpr, BITS: tl.constexpr):
    """The values of a slice, two in a word: int32 of the shape of `low`.

    `high` are the words of the high plane, shifted by one bit for the second half of
    the low words; `offset` is of `offset_words`.
    """
    PLACE: tl.constexpr = FIELD % fields_in_place(BITS)
    SHIFT: tl.constexpr = (FIELD - PLACE) * (4 if BITS == 4 else 2)
    MASK: tl.constexpr = (0x000F000F if BITS == 4 else 0x00030003) << 2 * PLACE
    words = (low >> SHIFT) & MASK | offset
    if BITS == 3:
        HIGH_SHIFT: tl.constexpr = SHIFT - 2
        moved = high >> HIGH_SHIFT if HIGH_SHIFT >= 0 else high << -HIGH_SHIFT
        # Not `|`, which the compiler would combine in an order that takes one more.
        words ^= moved & (0x00040004 << 2 * PLACE)
    return words


@triton.jit
def value_pairs(words, DTYPE: tl.constexpr):
    """The numbers in both halves of words [n, w], side by side: [n, 2 · w]."""
    first = words.to(tl.int16).to(DTYPE, bitcast=True)
    second = (words >> 16).to(tl.int16).to(DTYPE, bitcast=True)
    return tl.join(first, second).reshape(words.shape[0], 2 * words.shape[1])


@triton.jit
def scales_and_zeros(grid, DTYPE: tl.constexpr):
    """Scales and zero-points in words of the grid, as float32."""
    return high_half(grid, DTYPE), (grid << 16).to(tl.float32, bitcast=True)


@triton.jit
def group_of_slice(
    block, FIRST: tl.constexpr, COLUMNS: tl.constexpr, GROUP_SIZE: tl.constexpr
):
    """The group that a block's columns from FIRST on are in.

    GROUP_SIZE is 0 for groups that are whole rows.
    """
    if GROUP_SIZE == 0:
        return 0
    elif GROUP_SIZE > COLUMNS:
        return block // (GROUP_SIZE // COLUMNS)
    else:
        return block * (COLUMNS // GROUP_SIZE) + FIRST // GROUP_SIZE


@triton.jit
def load_segments(
    starts_ptr,
    segments_ptr,
    first,
    last,
    rows,
    out_features,
    SEGMENTS: tl.constexpr,
    SEGMENT: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Segments of kept weights from one on, of a block of rows.

    Returns:
        int32 columns and float32 values [SEGMENTS, SEGMENT], 0 past the block's last
        segment; whose they are, bool [rows, SEGMENTS].
    """
    numbers = first + tl.arange(0, SEGMENTS)
    places = numbers[:, None] * SEGMENT + tl.arange(0, SEGMENT)[None, :]
    words = tl.load(segments_ptr + places, mask=(numbers < last)[:, None], other=0)
    values = high_half(words, DTYPE)
    is_row = rows < out_features
    starts = tl.load(starts_ptr + rows, mask=is_row, other=0)
    ends = tl.load(starts_ptr + rows + 1, mask=is_row, other=0)
    owned = (numbers[None, :] >= starts[:, None]) & (numbers[None, :] < ends[:, None])
    return words & 0xFFFF, values, owned
