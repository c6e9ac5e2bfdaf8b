"""LLVM code of the exact CPU kernels, emitted through numba.

Both kernels walk packed rows in the same way, `LANES` codes at a time; they differ in
what they do with the weights: multiply them into x, or store them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numba
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from tacq_vllm.format.packing import PLANE_WIDTHS
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
    lane_sums,
    multiply_add,
    pick,
    put,
    same,
    sharer,
    splat,
    zeroed,
)
from tacq_vllm.kernels.cpu_rows import (
    ADDRESSES,
    ROW_TYPE,
    PackedRow,
    each_outlier,
    load_grid,
    row_finder,
    unpack_row,
)

ARGUMENTS = (
    *ADDRESSES,
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

_SIZES_TYPE = types.UniTuple(types.int64, 2)
"""Of a row: its groups, and a group's steps."""


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
    row_at, share = row_finder(bits), sharer(team)
    row_dot = _row_dot(bits, dtype, tokens)

    @numba.cfunc(types.void(types.voidptr))
    def body(pointer):
        a = numba.carray(pointer, len(ARGUMENTS), numba.int64)
        x, out, rows, columns, groups, steps = a[6], a[7], a[8], a[9], a[10], a[11]
        start, stop = share(a[12], a[13])
        for row in range(start, stop):
            packed = row_at(a, row, columns, groups, rows)
            places = (x, columns * 4, out + row * 4, rows * 4)
            row_dot(packed, (groups, steps), places)

    return body


def compile_dequantize(bits: int, dtype: torch.dtype, team: Team) -> Any:
    """Compile out[r - first_row] = W[r] in float32; otherwise as `compile_linear`."""
    row_at, share = row_finder(bits), sharer(team)
    row_values = _row_values(bits, dtype)

    @numba.cfunc(types.void(types.voidptr))
    def body(pointer):
        a = numba.carray(pointer, len(ARGUMENTS), numba.int64)
        out, rows, columns, groups, steps = a[7], a[8], a[9], a[10], a[11]
        first = a[12]
        start, stop = share(first, a[13])
        for row in range(start, stop):
            packed = row_at(a, row, columns, groups, rows)
            row_values(packed, (groups, steps), out + (row - first) * columns * 4)

    return body


def _row_dot(bits: int, dtype: torch.dtype, tokens: int) -> Any:
    """Intrinsic: one row of the weight times `tokens` rows of x.

    Per group, 16 lanes at a time: acc[t] += (code - zero) · x[t]; then
    sum[t] += scale · acc[t]; at the end out[t] = the lanes of sum[t] added up, and the
    kept weights' products.
    """

    @intrinsic
    def row_dot(typing_context, row, sizes, places):
        def codegen(context, builder, signature, arguments):
            row = unpack_row(builder, arguments[0])
            sizes = cgutils.unpack_tuple(builder, arguments[1])
            x, x_stride, out, out_stride = cgutils.unpack_tuple(builder, arguments[2])
            lines = [
                builder.add(x, builder.mul(x_stride, I64(token)))
                for token in range(tokens)
            ]
            sums = [zeroed(builder) for _ in lines]
            with _each_group(builder, row, sizes, bits, dtype) as (steps, zero, scale):
                partial = [zeroed(builder) for _ in lines]
                with _each_step(builder, row, steps, zero, bits) as (offset, weight):
                    for line, acc in zip(lines, partial, strict=True):
                        values = at(builder, builder.add(line, offset), I64(0), FLOATS)
                        add_product(builder, acc, weight, values)
                for total, acc in zip(sums, partial, strict=True):
                    add_product(builder, total, scale, builder.load(acc))
            targets = [
                builder.add(out, builder.mul(out_stride, I64(token)))
                for token in range(tokens)
            ]
            totals = lane_sums(builder, [builder.load(total) for total in sums])
            for token, target in enumerate(targets):
                put(builder, target, builder.extract_element(totals, I32(token)))
            with each_outlier(builder, row, dtype) as (column, value):
                for line, target in zip(lines, targets, strict=True):
                    total = at(builder, target, I64(0), F32)
                    x = at(builder, line, column, F32)
                    put(builder, target, multiply_add(builder, value, x, total))
            return context.get_dummy_value()

        return types.void(
            ROW_TYPE, _SIZES_TYPE, types.UniTuple(types.int64, 4)
        ), codegen

    return row_dot


def _row_values(bits: int, dtype: torch.dtype) -> Any:
    """Intrinsic: store one row of the weight as floats."""

    @intrinsic
    def row_values(typing_context, row, sizes, out):
        def codegen(context, builder, signature, arguments):
            row = unpack_row(builder, arguments[0])
            sizes, out = cgutils.unpack_tuple(builder, arguments[1]), arguments[2]
            with (
                _each_group(builder, row, sizes, bits, dtype) as (steps, zero, scale),
                _each_step(builder, row, steps, zero, bits) as (offset, weight),
            ):
                put(builder, builder.add(out, offset), builder.fmul(weight, scale))
            with each_outlier(builder, row, dtype) as (column, value):
                place = builder.add(out, builder.mul(column, I64(4)))
                low = at(builder, place, I64(0), F32)
                put(builder, place, builder.fadd(low, value))
            return context.get_dummy_value()

        return types.void(ROW_TYPE, _SIZES_TYPE, types.int64), codegen

    return row_values


@contextmanager
def _each_group(
    builder: Any, row: PackedRow, sizes: list[Any], bits: int, dtype: torch.dtype
) -> Iterator[tuple[tuple[Any, Any], Any, Any]]:
    """Loop over groups: the bounds of its steps; zero-point and scale in all lanes."""
    groups, steps = sizes
    with cgutils.for_range(builder, groups, intp=I64) as group:

        def load(base: Any, kind: Any) -> Any:
            return at(builder, base, group.index, kind)

        scale, zero = load_grid(builder, row, bits, dtype, load)
        first = builder.mul(group.index, steps)
        bounds = first, builder.add(first, steps)
        yield bounds, splat(builder, zero, WORDS), splat(builder, scale, FLOATS)


@contextmanager
def _each_step(
    builder: Any, row: PackedRow, bounds: tuple[Any, Any], zero: Any, bits: int
) -> Iterator[tuple[Any, Any]]:
    """Loop over a group's steps: byte offset in a float row, and code - zero."""
    with cgutils.for_range_slice(builder, *bounds, I64(1), I64) as (index, _):
        codes = _codes(builder, row, index, bits)
        weight = builder.sitofp(builder.sub(codes, zero), FLOATS)
        yield builder.mul(index, I64(LANES * 4)), weight


def _codes(builder: Any, row: PackedRow, index: Any, bits: int) -> Any:
    """The 16 codes at step `index` of a row, as 32-bit lanes."""
    width = PLANE_WIDTHS[bits][0]
    per_word = 32 // width
    count = LANES // per_word
    words = at(builder, row.low, index, ir.VectorType(I32, count))
    spread = pick(builder, words, [lane // per_word for lane in range(LANES)])
    shifts = ir.Constant(WORDS, [lane % per_word * width for lane in range(LANES)])
    fields = builder.lshr(spread, shifts)
    codes = builder.and_(fields, same(WORDS, (1 << width) - 1))
    if bits != 3:
        return codes
    # The 16 bits of the high plane are one lane mask.
    lanes = builder.bitcast(
        at(builder, row.high, index, I16), ir.VectorType(ir.IntType(1), LANES)
    )
    high = builder.select(lanes, same(WORDS, 4), same(WORDS, 0))
    return builder.or_(codes, high)
