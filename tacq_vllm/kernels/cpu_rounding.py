"""LLVM code that rounds activations to 8 bits, for the kernels that multiply bytes."""

from typing import Any, NamedTuple

import torch
from llvmlite import ir

from tacq_vllm.kernels.cpu_ir import (
    F32,
    I8,
    I32,
    I64,
    at,
    call,
    multiply_add,
    pick,
    same,
    splat,
    stored_type,
    to_float,
)

_TO_INTEGER = 1.5 * 2.0**23
"""Added to a small float it leaves the nearest integer in the lowest bits."""

_INTEGER_ZERO = 0x4B400000
"""Its bits."""


class RoundedBlock(NamedTuple):
    """LLVM values: neighbouring columns of one token that share a scale."""

    stored: Any
    """x as it is."""
    codes: Any
    """32-bit integers from -127 to 127."""
    scale: Any
    """A float: what a code counts. It is NaN or infinite if any x is."""


def round_block(
    builder: Any, place: Any, columns: int, dtype: torch.dtype
) -> RoundedBlock:
    """Read x at an address: scale = max|x| / 127, code = round(x / scale)."""
    floats, words = ir.VectorType(F32, columns), ir.VectorType(I32, columns)
    stored = at(builder, place, I64(0), ir.VectorType(stored_type(dtype), columns))
    values = to_float(builder, stored, dtype)
    # Without a sign, bits are ordered as floats are, and NaN is the largest.
    sizes = builder.and_(builder.bitcast(values, words), same(words, 0x7FFFFFFF))
    name = f"llvm.vector.reduce.umax.v{columns}i32"
    largest = builder.bitcast(call(builder, name, I32, [sizes]), F32)
    usable = builder.fcmp_ordered(">", largest, F32(0.0))
    inverse = builder.fdiv(F32(127.0), largest)
    inverse = splat(builder, builder.select(usable, inverse, F32(0.0)), floats)
    shifted = multiply_add(builder, values, inverse, same(floats, _TO_INTEGER))
    codes = builder.sub(builder.bitcast(shifted, words), same(words, _INTEGER_ZERO))
    return RoundedBlock(stored, codes, builder.fdiv(largest, F32(127.0)))


def ordered_codes(builder: Any, codes: Any, span: int, stride: int) -> Any:
    """A block's codes as bytes, in the order in which those of weights are unpacked.

    Word 0 of every lane is followed by word 1 of every lane.

    Args:
        builder: what appends instructions.
        codes: 32-bit integers.
        span: columns of a lane.
        stride: columns from a byte of a lane's word to the next; see `Rows`.
    """
    count = codes.type.count
    order = [
        lane + number + stride * byte
        for number in range(stride)
        for lane in range(0, count, span)
        for byte in range(4)
    ]
    narrow = builder.trunc(codes, ir.VectorType(I8, count))
    return pick(builder, narrow, order)


def sum_codes(builder: Any, codes: Any, first: int, count: int) -> Any:
    """The sum of some of a block's codes: a 32-bit integer."""
    part = pick(builder, codes, list(range(first, first + count)))
    return call(builder, f"llvm.vector.reduce.add.v{count}i32", I32, [part])
