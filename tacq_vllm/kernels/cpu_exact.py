"""LLVM code of the exact CPU kernels, emitted through numba.

Both kernels walk packed rows in the same way, `LANES` codes at a time; they differ in
what they do with the weights: multiply them into x, or store them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numba
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from tacq_vllm.kernels.cpu_ir import (
    F32,
    FLOATS,
    I16,
    I32,
    I64,
    LANES,
    WORDS,
    Team,
    add_product,
    at,
    lane_sum,
    loader,
    row_sharer,
    splat,
    store,
    to_float,
    zeroed,
)

ARGUMENTS = (
    "qweight",
    "qweight_high",
    "scales",
    "qzeros",
    "qzeros_high",
    "outliers",
    "x",
    "out",
    "out_features",
    "in_features",
    "groups",
    "steps",
    "first_row",
    "last_row",
)
"""What a kernel is given, as 64-bit integers: addresses of tensors, then sizes.

`steps` of LANES columns make a group; rows from `first_row` to before `last_row` are
worked on.
"""

_NUM_ARGUMENTS = len(ARGUMENTS)


def compile_linear(bits: int, dtype: torch.dtype, tokens: int, team: Team) -> Any:
    """Compile out[t, r] = x[t] · W[r] for `tokens` rows of x, all in float32.

    Args:
        bits: bits of a code.
        dtype: 16-bit type of scales and kept weights.
        tokens: rows of x.
        team: where the calling thread is.

    Returns:
        A C function void(int64 *arguments) with an `address`, to be called by every
        thread of a team; a row belongs to one thread.
    """
    row_at, share = _row_finder(bits), row_sharer(team, ARGUMENTS)
    row_dot = _row_dot(bits, dtype, tokens)
    value_at, word_at = loader(I16, dtype), loader(I32)
    float_at = loader(F32)

    @numba.cfunc(types.void(types.voidptr))
    def body(pointer):
        a = numba.carray(pointer, _NUM_ARGUMENTS, numba.int64)
        outliers, x, out, rows, columns = a[5], a[6], a[7], a[8], a[9]
        entries = outliers + (rows + 1) * 4
        start, stop = share(a)
        for row in range(start, stop):
            row_dot(row_at(a, row), (x, columns * 4, out + row * 4, rows * 4))
            for index in range(word_at(outliers, row), word_at(outliers, row + 1)):
                column = word_at(entries, index) & 0xFFFF
                value = value_at(entries + 2, 2 * index)
                for token in range(tokens):
                    place = token * rows + row
                    product = value * float_at(x, token * columns + column)
                    store(out, place, float_at(out, place) + product)

    return body


def compile_dequantize(bits: int, dtype: torch.dtype, team: Team) -> Any:
    """Compile out[r - first_row] = W[r] in float32; otherwise as `compile_linear`."""
    row_at, share = _row_finder(bits), row_sharer(team, ARGUMENTS)
    row_values = _row_values(bits, dtype)
    value_at, word_at = loader(I16, dtype), loader(I32)
    float_at = loader(F32)

    @numba.cfunc(types.void(types.voidptr))
    def body(pointer):
        a = numba.carray(pointer, _NUM_ARGUMENTS, numba.int64)
        outliers, out, rows, columns, first = a[5], a[7], a[8], a[9], a[12]
        entries = outliers + (rows + 1) * 4
        start, stop = share(a)
        for row in range(start, stop):
            target = out + (row - first) * columns * 4
            row_values(row_at(a, row), target)
            for index in range(word_at(outliers, row), word_at(outliers, row + 1)):
                column = word_at(entries, index) & 0xFFFF
                value = value_at(entries + 2, 2 * index)
                store(target, column, float_at(target, column) + value)

    return body


def _row_finder(bits: int) -> Any:
    width = 4 if bits == 4 else 2

    @numba.njit(inline="always")
    def row_at(a, row):
        """Addresses and sizes of one row, in the order of `_Row`."""
        columns, groups = a[9], a[10]
        return (
            a[0] + row * (columns * width // 8),
            a[1] + row * (columns // 8),
            a[2] + row * groups * 2,
            a[3] + (row * width >> 5) * groups * 4,
            row * width & 31,
            a[4] + (row >> 5) * groups * 4,
            row & 31,
            groups,
            a[11],
        )

    return row_at


@dataclass(frozen=True)
class _Row:
    """LLVM values that describe one packed row."""

    low: Any
    high: Any
    scales: Any
    zeros: Any
    zero_shift: Any
    zeros_high: Any
    zero_high_shift: Any
    groups: Any
    steps: Any


_ROW_TYPE = types.UniTuple(types.int64, 9)


@contextmanager
def _each_group(
    builder: Any, row: _Row, bits: int, dtype: torch.dtype
) -> Iterator[tuple[Any, Any, Any]]:
    """Loop over groups: the first step, the zero-point and the scale, in all lanes."""
    with cgutils.for_range(builder, row.groups, intp=I64) as group:
        stored = at(builder, row.scales, group.index, I16)
        scale = splat(builder, to_float(builder, stored, dtype), FLOATS)
        zero = _field(builder, row.zeros, group.index, row.zero_shift, bits)
        if bits == 3:
            top = _field(
                builder, row.zeros_high, group.index, row.zero_high_shift, width=1
            )
            zero = builder.or_(zero, builder.shl(top, I32(2)))
        first = builder.mul(group.index, row.steps)
        yield first, splat(builder, zero, WORDS), scale


@contextmanager
def _each_step(
    builder: Any, row: _Row, first: Any, zero: Any, bits: int
) -> Iterator[tuple[Any, Any]]:
    """Loop over a group's steps: byte offset in a float row, and code - zero."""
    with cgutils.for_range(builder, row.steps, intp=I64) as step:
        index = builder.add(first, step.index)
        codes = _codes(builder, row, index, bits)
        weight = builder.sitofp(builder.sub(codes, zero), FLOATS)
        yield builder.mul(index, I64(LANES * 4)), weight


def _row_dot(bits: int, dtype: torch.dtype, tokens: int) -> Any:
    """Intrinsic: one row of the low-bit weight times `tokens` rows of x.

    Per group, 16 lanes at a time: acc[t] += (code - zero) · x[t]; then
    sum[t] += scale · acc[t]; at the end out[t] = the lanes of sum[t] added up.
    """

    @intrinsic
    def row_dot(typing_context, row, places):
        def codegen(context, builder, signature, arguments):
            row = _Row(*cgutils.unpack_tuple(builder, arguments[0]))
            x, x_stride, out, out_stride = cgutils.unpack_tuple(builder, arguments[1])
            sums = [zeroed(builder) for _ in range(tokens)]
            with _each_group(builder, row, bits, dtype) as (first, zero, scale):
                partial = [zeroed(builder) for _ in range(tokens)]
                with _each_step(builder, row, first, zero, bits) as (offset, weight):
                    for token, acc in enumerate(partial):
                        line = builder.add(x, builder.mul(x_stride, I64(token)))
                        place = builder.add(line, offset)
                        values = at(builder, place, I64(0), FLOATS)
                        add_product(builder, acc, weight, values)
                for total, acc in zip(sums, partial, strict=True):
                    add_product(builder, total, scale, builder.load(acc))
            for token, total in enumerate(sums):
                place = builder.add(out, builder.mul(out_stride, I64(token)))
                pointer = builder.inttoptr(place, F32.as_pointer())
                builder.store(lane_sum(builder, builder.load(total)), pointer)
            return context.get_dummy_value()

        return types.void(_ROW_TYPE, types.UniTuple(types.int64, 4)), codegen

    return row_dot


def _row_values(bits: int, dtype: torch.dtype) -> Any:
    """Intrinsic: store (code - zero) · scale of one row as floats."""

    @intrinsic
    def row_values(typing_context, row, out):
        def codegen(context, builder, signature, arguments):
            row = _Row(*cgutils.unpack_tuple(builder, arguments[0]))
            out = arguments[1]
            with (
                _each_group(builder, row, bits, dtype) as (first, zero, scale),
                _each_step(builder, row, first, zero, bits) as (offset, weight),
            ):
                pointer = builder.inttoptr(
                    builder.add(out, offset), FLOATS.as_pointer()
                )
                builder.store(builder.fmul(weight, scale), pointer, align=4)
            return context.get_dummy_value()

        return types.void(_ROW_TYPE, types.int64), codegen

    return row_values


def _codes(builder: Any, row: _Row, index: Any, bits: int) -> Any:
    """The 16 codes at step `index` of a row, as 32-bit lanes."""
    if bits == 4:
        pair = at(builder, row.low, index, ir.VectorType(I32, 2))
        picks = ir.Constant(WORDS, [0] * 8 + [1] * 8)
        words = builder.shuffle_vector(pair, pair, picks)
        shifts = ir.Constant(WORDS, [4 * (lane % 8) for lane in range(LANES)])
    else:
        words = splat(builder, at(builder, row.low, index, I32), WORDS)
        shifts = ir.Constant(WORDS, [2 * lane for lane in range(LANES)])
    mask = ir.Constant(WORDS, [15 if bits == 4 else 3] * LANES)
    codes = builder.and_(builder.lshr(words, shifts), mask)
    if bits != 3:
        return codes
    # The 16 bits of the high plane are one lane mask.
    lanes = builder.bitcast(
        at(builder, row.high, index, I16), ir.VectorType(ir.IntType(1), LANES)
    )
    four, none = (ir.Constant(WORDS, [value] * LANES) for value in (4, 0))
    return builder.or_(codes, builder.select(lanes, four, none))


def _field(builder: Any, base: Any, index: Any, shift: Any, width: int) -> Any:
    """The packed zero-point (3 bits: its low or high part) in word `index`."""
    word = builder.lshr(at(builder, base, index, I32), builder.trunc(shift, I32))
    return builder.and_(word, I32({1: 1, 2: 3, 3: 3, 4: 15}[width]))
