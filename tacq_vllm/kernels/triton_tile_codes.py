"""Reading the codes of `tiles` in Triton: two weights with one mask.

A code goes into the mantissa of 128 in bfloat16, or of 1024 in float16, where it is a
number without a conversion, and without a shift too while it is within the last seven
bits: field 1 of a word then counts for 4 times its code, field 2 for 16 times. What the
numbers are too large by comes off with the zero-point; the scale makes up for the rest.
"""

import triton
import triton.language as tl

from tacq_vllm.kernels.triton_codes import high_half

SIGNS = tl.constexpr(-0x7FFF8000)
"""-0.0 in both halves of a word."""


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


@triton.constexpr_function
def unit_words(field, bits, dtype):
    """`field_unit` in both halves of a word."""
    bias, mantissa_bits = (127, 7) if dtype.is_bf16() else (15, 10)
    return (bias - 2 * (field % fields_in_place(bits)) << mantissa_bits) * 0x00010001


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
def negative_zeros(grid, offset, FIELD: tl.constexpr, BITS: tl.constexpr):
    """What takes a slice's values to 0 at their zero-points, two in a word."""
    PLACE: tl.constexpr = FIELD % fields_in_place(BITS)
    return (grid & 0xFFFF) * (0x00010001 << 2 * PLACE) + (offset | SIGNS)


@triton.jit
def scale_pairs(
    grid,
    FIELD: tl.constexpr,
    BITS: tl.constexpr,
    DTYPE: tl.constexpr,
    X_TYPE: tl.constexpr,
):
    """Scales of a slice's values, two in a word.

    In float16 those under 2^-10 are subnormal by their unit, and lose bits.
    """
    if DTYPE == X_TYPE:
        pairs = (grid & -0x10000) | (grid >> 16 & 0xFFFF)
    else:
        scales = high_half(grid, DTYPE).to(X_TYPE).to(tl.int16, bitcast=True)
        pairs = (scales.to(tl.int32) & 0xFFFF) * 0x00010001
    if FIELD % fields_in_place(BITS) > 0:
        pairs = pair_fma(pairs, unit_words(FIELD, BITS, X_TYPE), SIGNS, X_TYPE)
    return pairs


@triton.jit
def pair_weights(words, zeros, scales, X_TYPE: tl.constexpr):
    """Weights of a slice, two in a word, rounded once to the type of x."""
    ONE: tl.constexpr = unit_words(0, 4, X_TYPE)
    off_zero = pair_fma(words, ONE, zeros, X_TYPE)
    return pair_fma(off_zero, scales, SIGNS, X_TYPE)


@triton.jit
def pair_fma(a, b, c, X_TYPE: tl.constexpr):
    """Give a · b + c in both halves of words; Triton has no type for two numbers."""
    ASSEMBLY: tl.constexpr = (
        "fma.rn.bf16x2 $0, $1, $2, $3;"
        if X_TYPE.is_bf16()
        else "fma.rn.f16x2 $0, $1, $2, $3;"
    )
    return tl.inline_asm_elementwise(
        ASSEMBLY, "=r,r,r,r", [a, b, c], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def value_pairs(words, DTYPE: tl.constexpr):
    """The numbers in both halves of words [n, w], side by side: [n, 2 · w]."""
    first = words.to(tl.int16).to(DTYPE, bitcast=True)
    second = (words >> 16).to(tl.int16).to(DTYPE, bitcast=True)
    return tl.join(first, second).reshape(words.shape[0], 2 * words.shape[1])


@triton.jit
def scales_and_zeros(grid, DTYPE: tl.constexpr):
    """Scales and zero-points in words of the grid, as float32."""
    return high_half(grid, DTYPE), (grid & 0xFFFF).to(tl.float32)


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


@triton.constexpr_function
def groups_of_block(columns, group_size):
    """How many groups a block of columns has, or has a part of."""
    return max(1, columns // group_size) if group_size else 1


@triton.constexpr_function
def group_in_block(first, columns, group_size):
    """Which of them a slice is in that begins with a block's column."""
    return first // group_size if 0 < group_size < columns else 0


@triton.jit
def entry_rows(words):
    """Rows of kept weights, among those that lie together."""
    return words & 0xF


@triton.jit
def entry_columns(words, panels):
    """Columns of kept weights in panels, which begin after that many columns."""
    return panels + ((words & 0xFFFF) >> 4)
