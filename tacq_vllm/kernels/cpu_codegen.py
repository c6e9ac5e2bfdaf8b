"""LLVM code of the CPU kernel, emitted through numba."""

from collections.abc import Callable
from typing import Any

import numba
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 16
"""Codes that are unpacked at a time."""

NUM_ARGUMENTS = 12

_I16, _I32, _I64 = ir.IntType(16), ir.IntType(32), ir.IntType(64)
_F32 = ir.FloatType()
_VECTOR_F32 = ir.VectorType(_F32, LANES)
_VECTOR_I32 = ir.VectorType(_I32, LANES)


def compile_body(
    bits: int,
    dtype: torch.dtype,
    tokens: int,
    thread_number: Callable[[], int],
    num_threads: Callable[[], int],
) -> Any:
    """Compile the body of a parallel region: a C function void(void *arguments).

    Args:
        bits: bits of a code.
        dtype: 16-bit type of scales and kept weights.
        tokens: rows of x that it multiplies with.
        thread_number: C function, the number of the calling thread in its team.
        num_threads: C function, the size of the team.

    Returns:
        A numba function with an `address`. It takes `NUM_ARGUMENTS` 64-bit integers:
        addresses of qweight, qweight_high, scales, qzeros, qzeros_high, outliers, x
        (float32 [tokens, in]) and out (float32 [tokens, out]); then out_features,
        in_features, groups, and steps of `LANES` columns in a group.
    """
    row_dot = _row_dot(bits, dtype, tokens)
    value_at = _load(_I16, _float_from_half(dtype))
    word_at, float_at, store = _load(_I32), _load(_F32), _store
    plane_width = 4 if bits == 4 else 2

    @numba.cfunc(types.void(types.voidptr))
    def body(pointer):
        a = numba.carray(pointer, NUM_ARGUMENTS, numba.int64)
        low, high, scales, zeros, zeros_high = a[0], a[1], a[2], a[3], a[4]
        outliers, x, out = a[5], a[6], a[7]
        rows, columns, groups, steps = a[8], a[9], a[10], a[11]
        entries = outliers + (rows + 1) * 4
        share = (rows + num_threads() - 1) // num_threads()
        start = thread_number() * share
        for row in range(start, min(start + share, rows)):
            zero_bit = row * plane_width
            row_dot(
                low + row * (columns * plane_width // 8),
                high + row * (columns // 8),
                scales + row * groups * 2,
                zeros + (zero_bit >> 5) * groups * 4,
                zero_bit & 31,
                zeros_high + (row >> 5) * groups * 4,
                row & 31,
                x,
                columns * 4,
                out + row * 4,
                rows * 4,
                groups,
                steps,
            )
            for index in range(word_at(outliers, row), word_at(outliers, row + 1)):
                entry = word_at(entries, index)
                value = value_at(entries + 2, 2 * index)
                for token in range(tokens):
                    place = token * rows + row
                    product = value * float_at(x, token * columns + (entry & 0xFFFF))
                    store(out, place, float_at(out, place) + product)

    return body


def _row_dot(bits: int, dtype: torch.dtype, tokens: int) -> Any:
    """Intrinsic: one row of the low-bit weight times `tokens` rows of x.

    Per group, 16 lanes at a time: acc[t] += (code - zero) · x[t]; then
    sum[t] += scale · acc[t]; at the end out[t] = the lanes of sum[t] added up.
    """
    half_to_float = _float_from_half(dtype)

    @intrinsic
    def row_dot(
        typing_context,
        low,
        high,
        scales,
        zeros,
        zero_shift,
        zeros_high,
        zero_high_shift,
        x,
        x_stride,
        out,
        out_stride,
        groups,
        steps,
    ):
        def codegen(context, builder, signature, arguments):
            (
                low,
                high,
                scales,
                zeros,
                zero_shift,
                zeros_high,
                zero_high_shift,
                x,
                x_stride,
                out,
                out_stride,
                groups,
                steps,
            ) = arguments
            sums = [_zeroed(builder) for _ in range(tokens)]
            with cgutils.for_range(builder, groups, intp=_I64) as group:
                scale = half_to_float(builder, _at(builder, scales, group.index, _I16))
                zero = _field(builder, zeros, group.index, zero_shift, bits)
                if bits == 3:
                    top = _field(builder, zeros_high, group.index, zero_high_shift, 1)
                    zero = builder.or_(zero, builder.shl(top, _I32(2)))
                zero = _splat(builder, zero, _VECTOR_I32)
                partial = [_zeroed(builder) for _ in range(tokens)]
                first = builder.mul(group.index, steps)
                with cgutils.for_range(builder, steps, intp=_I64) as step:
                    index = builder.add(first, step.index)
                    codes = _codes(builder, low, high, index, bits)
                    weight = builder.sitofp(builder.sub(codes, zero), _VECTOR_F32)
                    column = builder.mul(index, _I64(LANES * 4))
                    for token, acc in enumerate(partial):
                        place = builder.add(
                            builder.add(x, column),
                            builder.mul(x_stride, _I64(token)),
                        )
                        values = _at(builder, place, _I64(0), _VECTOR_F32)
                        _add_product(builder, acc, weight, values)
                scale = _splat(builder, scale, _VECTOR_F32)
                for total, acc in zip(sums, partial, strict=True):
                    _add_product(builder, total, scale, builder.load(acc))
            for token, total in enumerate(sums):
                place = builder.add(out, builder.mul(out_stride, _I64(token)))
                pointer = builder.inttoptr(place, _F32.as_pointer())
                builder.store(_lane_sum(builder, builder.load(total)), pointer)
            return context.get_dummy_value()

        return types.void(*(types.int64,) * 13), codegen

    return row_dot


def _codes(builder: Any, low: Any, high: Any, index: Any, bits: int) -> Any:
    """The 16 codes at step `index` of a row, as 32-bit lanes."""
    if bits == 4:
        pair = _at(builder, low, index, ir.VectorType(_I32, 2))
        picks = ir.Constant(_VECTOR_I32, [0] * 8 + [1] * 8)
        words = builder.shuffle_vector(pair, pair, picks)
        shifts = ir.Constant(_VECTOR_I32, [4 * (lane % 8) for lane in range(LANES)])
    else:
        words = _splat(builder, _at(builder, low, index, _I32), _VECTOR_I32)
        shifts = ir.Constant(_VECTOR_I32, [2 * lane for lane in range(LANES)])
    mask = ir.Constant(_VECTOR_I32, [15 if bits == 4 else 3] * LANES)
    codes = builder.and_(builder.lshr(words, shifts), mask)
    if bits != 3:
        return codes
    # The 16 bits of the high plane are one lane mask.
    lanes = builder.bitcast(
        _at(builder, high, index, _I16), ir.VectorType(ir.IntType(1), LANES)
    )
    four, none = (ir.Constant(_VECTOR_I32, [value] * LANES) for value in (4, 0))
    return builder.or_(codes, builder.select(lanes, four, none))


def _field(builder: Any, base: Any, index: Any, shift: Any, bits: int) -> Any:
    """The packed zero-point (or its high bit) in word `index`."""
    word = builder.lshr(_at(builder, base, index, _I32), builder.trunc(shift, _I32))
    return builder.and_(word, _I32({1: 1, 2: 3, 3: 3, 4: 15}[bits]))


def _at(builder: Any, base: Any, index: Any, kind: Any) -> Any:
    """Load element `index` of an array of `kind` at the address `base`."""
    lanes = getattr(kind, "count", 1)
    width = getattr(kind, "element", kind)
    size = {_I16: 2, _I32: 4, _F32: 4}[width] * lanes
    address = builder.add(base, builder.mul(index, _I64(size)))
    return builder.load(builder.inttoptr(address, kind.as_pointer()), align=2)


def _splat(builder: Any, value: Any, kind: Any) -> Any:
    undefined = ir.Constant(kind, ir.Undefined)
    single = builder.insert_element(undefined, value, _I32(0))
    lanes = ir.Constant(_VECTOR_I32, [0] * LANES)
    return builder.shuffle_vector(single, undefined, lanes)


def _zeroed(builder: Any) -> Any:
    """A vector of sums on the stack, which the compiler keeps in a register."""
    slot = cgutils.alloca_once(builder, _VECTOR_F32)
    builder.store(ir.Constant(_VECTOR_F32, [0.0] * LANES), slot)
    return slot


def _add_product(builder: Any, slot: Any, a: Any, b: Any) -> None:
    kind = ir.FunctionType(_VECTOR_F32, [_VECTOR_F32] * 3)
    function = cgutils.get_or_insert_function(
        builder.module, kind, "llvm.fmuladd.v16f32"
    )
    builder.store(builder.call(function, [a, b, builder.load(slot)]), slot)


def _lane_sum(builder: Any, vector: Any) -> Any:
    kind = ir.FunctionType(_F32, [_F32, _VECTOR_F32])
    function = cgutils.get_or_insert_function(
        builder.module, kind, "llvm.vector.reduce.fadd.v16f32"
    )
    return builder.call(function, [_F32(0.0), vector], fastmath=("reassoc",))


def _float_from_half(dtype: torch.dtype) -> Callable[[Any, Any], Any]:
    """Emitter: the 16 bits of a stored value to a float."""

    def convert(builder: Any, bits: Any) -> Any:
        if dtype == torch.float16:
            return builder.fpext(builder.bitcast(bits, ir.HalfType()), _F32)
        word = builder.shl(builder.zext(bits, _I32), _I32(16))
        return builder.bitcast(word, _F32)

    return convert


def _load(kind: Any, convert: Callable[[Any, Any], Any] | None = None) -> Any:
    """Intrinsic: element `index` of an array at an address."""
    result = types.int32 if kind is _I32 else types.float32

    @intrinsic
    def load(typing_context, base, index):
        def codegen(context, builder, signature, arguments):
            base, index = arguments
            value = _at(builder, base, index, kind)
            return value if convert is None else convert(builder, value)

        return result(types.int64, types.int64), codegen

    return load


@intrinsic
def _store(typing_context, base, index, value):
    """Store a float at element `index` of an array at an address."""

    def codegen(context, builder, signature, arguments):
        base, index, value = arguments
        address = builder.add(base, builder.mul(index, _I64(4)))
        builder.store(value, builder.inttoptr(address, _F32.as_pointer()))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.float32), codegen
