"""Reading the codes of `tiles` in Triton: two weights with a shift and a mask.

A code goes into the mantissa of 128 in bfloat16, or of 1024 in float16, where it is a
number without a conversion. What the number is too large by is part of the zero-point.
"""

import triton
import triton.language as tl

from tacq_vllm.kernels.triton_codes import high_half


@triton.jit
def slice_words(
    low,
    high,
    HALF: tl.constexpr,
    FIELD: tl.constexpr,
    BITS: tl.constexpr,
    ONES: tl.constexpr,
):
    """Codes of one slice, two in a word and each in the last bits of ONES: int32.

    HALF is which of the two blocks of low words that share the high ones.
    """
    WIDTH: tl.constexpr = 4 if BITS == 4 else 2
    words = (low >> (FIELD * WIDTH)) & (0x000F000F if BITS == 4 else 0x00030003) | ONES
    if BITS == 3:
        SHIFT: tl.constexpr = HALF * 8 + FIELD - 2
        moved = high >> SHIFT if SHIFT >= 0 else high << -SHIFT
        words |= moved & 0x00040004
    return words


@triton.jit
def slice_values(
    low,
    high,
    HALF: tl.constexpr,
    FIELD: tl.constexpr,
    BITS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """One slice of words [n, w] as numbers of a 16-bit type: [n, 2 · w].

    They are too large by `value_offset`.
    """
    ONES: tl.constexpr = 0x43004300 if DTYPE.is_bf16() else 0x64006400
    words = slice_words(low, high, HALF, FIELD, BITS, ONES)
    first = words.to(tl.int16).to(DTYPE, bitcast=True)
    second = (words >> 16).to(tl.int16).to(DTYPE, bitcast=True)
    return tl.join(first, second).reshape(low.shape[0], 2 * low.shape[1])


@triton.constexpr_function
def value_offset(dtype):
    """What `slice_values` are too large by."""
    return 128.0 if dtype.is_bf16() else 1024.0


@triton.jit
def scales_and_zeros(grid, DTYPE: tl.constexpr):
    """Scales and zero-points in words of the grid, as float32."""
    return high_half(grid, DTYPE), (grid & 0xFFFF).to(tl.float32)


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
