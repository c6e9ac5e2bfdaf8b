"""Reading the codes of `tiles` in Triton: two weights with one mask.

A code goes into the mantissa of 128 in bfloat16, or of 1024 in float16, where it is a
number without a conversion, and without a shift too while it is within the last seven
bits: field 1 of 2 bits then counts for 4 times its code, field 2 for 16 times. What the
numbers are too large by comes off with the zero-point; the scale makes up for the rest.
"""

import triton
import triton.language as tl

from tacq_vllm.kernels import tiles
from tacq_vllm.kernels.triton_codes import high_half

PART_WORDS = tl.constexpr(tiles.PART_WORDS)
STRIP = tl.constexpr(tiles.STRIP)
SIGNS = tl.constexpr(-0x7FFF8000)
"""-0.0 in both halves of a word."""

block_words = triton.constexpr_function(tiles.block_words)
block_columns = triton.constexpr_function(tiles.block_columns)
part_of_strip = triton.constexpr_function(tiles.part_of_strip)
field_of_strip = triton.constexpr_function(tiles.field_of_strip)


@triton.constexpr_function
def place_of_strip(strip, bits):
    """The lowest bit of a strip's codes in the mantissa, when words are shifted."""
    field = field_of_strip(strip, bits)
    # As many fields as are within the mantissa are shifted together; the one of which
    # all parts have a bit is put together in the lowest place.
    together = {2: 3, 3: 2, 4: 1}[bits]
    return 0 if (field + 1) * bits > 16 else field % together * bits


@triton.constexpr_function
def strip_unit(strip, bits):
    """What the code part of a strip's values is to be multiplied with."""
    return 2.0 ** -place_of_strip(strip, bits)


@triton.constexpr_function
def value_offset(dtype):
    """What a strip's values are too large by."""
    return 128.0 if dtype.is_bf16() else 1024.0


@triton.constexpr_function
def offset_words(dtype):
    """That number in both halves of a word."""
    return 0x43004300 if dtype.is_bf16() else 0x64006400


@triton.constexpr_function
def unit_words(place, dtype):
    """2^-place in both halves of a word."""
    bias, mantissa_bits = (127, 7) if dtype.is_bf16() else (15, 10)
    return (bias - place << mantissa_bits) * 0x00010001


@triton.jit
def in_register(word):
    """The same word, which the compiler must not take to be a parameter of the kernel.

    Before compute capability 9.0 an instruction that takes one from there has no place
    for a mask: `strip_words` would take two.
    """
    # No multiprocessor has such a number.
    return tl.inline_asm_elementwise(
        "{.reg .b32 none; mov.b32 none, %smid; shr.u32 none, none, 31;"
        " or.b32 $0, $1, none;}",
        "=r,r",
        [word],
        dtype=tl.int32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def strip_words(words, offset, NUMBER: tl.constexpr, BITS: tl.constexpr):
    """The values of a strip, two in a word: int32 [n, PART_WORDS].

    `words` are of all parts of its block, `offset` is of `offset_words`.
    """
    FIRST: tl.constexpr = field_of_strip(NUMBER, BITS) * BITS
    if FIRST + BITS > 16:
        pairs = (words[0] >> FIRST) & 0x00010001 | offset
        # Not `|`, which the compiler would combine in an order that takes one more.
        pairs ^= (words[1] >> (FIRST - 1)) & 0x00020002
        pairs ^= (words[2] >> (FIRST - 2)) & 0x00040004
        return pairs
    else:
        PLACE: tl.constexpr = place_of_strip(NUMBER, BITS)
        MASK: tl.constexpr = ((1 << BITS) - 1) * 0x00010001 << PLACE
        return (words[part_of_strip(NUMBER, BITS)] >> (FIRST - PLACE)) & MASK | offset


@triton.jit
def negative_zeros(grid, offset, PLACE: tl.constexpr, X_TYPE: tl.constexpr):
    """What takes codes at a place, times its unit, to 0 at their zero-points.

    Two in a word, like codes. A zero-point has its place in the mantissa too, of a
    number with the unit's exponent.
    """
    too_large = offset + (unit_words(PLACE, X_TYPE) - unit_words(0, X_TYPE)) | SIGNS
    return (grid & 0xFFFF) * (0x00010001 << PLACE) + too_large


@triton.jit
def scale_pairs(grid, DTYPE: tl.constexpr, X_TYPE: tl.constexpr):
    """Scales in the type of x, two in a word."""
    if DTYPE == X_TYPE:
        return high_pairs(grid, grid)
    else:
        scales = high_half(grid, DTYPE).to(X_TYPE).to(tl.int16, bitcast=True)
        return (scales.to(tl.int32) & 0xFFFF) * 0x00010001


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
def high_pairs(first, second):
    """The high halves of two words as one word."""
    return tl.inline_asm_elementwise(
        "prmt.b32 $0, $1, $2, 0x7632;",
        "=r,r,r",
        [first, second],
        dtype=tl.int32,
        is_pure=True,
        pack=1,
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
def first_group(block, COLUMNS: tl.constexpr, GROUP_SIZE: tl.constexpr):
    """The group that a block's first column is in.

    GROUP_SIZE is 0 for groups that are whole rows.
    """
    if GROUP_SIZE == 0:
        return 0
    elif GROUP_SIZE > COLUMNS:
        return block // (GROUP_SIZE // COLUMNS)
    else:
        return block * (COLUMNS // GROUP_SIZE)


@triton.constexpr_function
def groups_of_block(columns, group_size):
    """How many groups a block of columns has, or has a part of."""
    return max(1, columns // group_size) if group_size else 1


@triton.constexpr_function
def group_of_strip(strip, columns, group_size):
    """Which of them a strip of a block is in."""
    return strip * tiles.STRIP // group_size if 0 < group_size < columns else 0


@triton.constexpr_function
def ends_group(strip, columns, group_size):
    """Whether a strip is the last one of its group in a block."""
    end = (strip + 1) * tiles.STRIP
    return end == columns or (group_size > 0 and end % group_size == 0)


@triton.jit
def entry_rows(words):
    """Rows of kept weights, among those that lie together."""
    return words >> 12 & 0xF


@triton.jit
def is_in_row(words, rows):
    """Whether kept weights are in rows among those that lie together."""
    # Words are not shifted, unlike by `entry_rows`.
    return (words & 0xF000) == rows << 12


@triton.jit
def entry_columns(words):
    """Columns of kept weights in their panels."""
    return words & 0xFFF
