"""LLVM code of the exact CPU kernels, emitted through numba.

Both kernels walk rows in the same way, a step of columns at a time; they differ in what
they do with the weights: multiply them into x, or store them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numba
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from tacq_vllm.kernels.cpu_ir import (
    F32,
    FLOATS,
    I32,
    I64,
    LANES,
    WORDS,
    Team,
    add_product,
    at,
    lane_sums,
    multiply_add,
    put,
    sharer,
    splat,
    zeroed,
)
from tacq_vllm.kernels.cpu_rows import Row, Rows, each_outlier

ARGUMENTS = (
    "x",
    "out",
    "out_features",
    "in_features",
    "groups",
    "steps",
    "first_row",
    "last_row",
)
"""What a kernel is given, as 64-bit integers, before the addresses of a weight.

`steps` of columns make a group; rows from `first_row` to before `last_row` are
worked on.
"""

_SIZES_TYPE = types.UniTuple(types.int64, 2)
"""Of a row: its groups, and a group's steps."""


def compile_linear(stored: Rows, tokens: int, team: Team) -> Any:
    """Compile out[t, r] = x[t] · W[r] for `tokens` rows of x, all in float32.

    Args:
        stored: reads the weight.
        tokens: rows of x.
        team: where the calling thread is.

    Returns:
        A C function void(int64 *arguments) with an `address`, to be called by every
        thread of a team; a row belongs to one thread.
    """
    row_at, share = stored.finder(), sharer(team)
    head = len(ARGUMENTS)
    arguments = head + stored.addresses
    row_dot = _row_dot(stored, tokens)

    @numba.cfunc(types.void(types.voidptr))
    def body(pointer):
        a = numba.carray(pointer, arguments, numba.int64)
        weight = a[head:]
        x, out, rows, columns, groups, steps = a[0], a[1], a[2], a[3], a[4], a[5]
        start, stop = share(a[6], a[7])
        for row in range(start, stop):
            packed = row_at(weight, row, columns, groups, rows)
            places = (x, columns * 4, out + row * 4, rows * 4)
            row_dot(packed, (groups, steps), places)

    return body


def compile_dequantize(stored: Rows, team: Team) -> Any:
    """Compile out[r - first_row] = W[r] in float32; otherwise as `compile_linear`."""
    row_at, share = stored.finder(), sharer(team)
    head = len(ARGUMENTS)
    arguments = head + stored.addresses
    row_values = _row_values(stored)

    @numba.cfunc(types.void(types.voidptr))
    def body(pointer):
        a = numba.carray(pointer, arguments, numba.int64)
        weight = a[head:]
        out, rows, columns, groups, steps = a[1], a[2], a[3], a[4], a[5]
        first = a[6]
        start, stop = share(first, a[7])
        for row in range(start, stop):
            packed = row_at(weight, row, columns, groups, rows)
            row_values(packed, (groups, steps), out + (row - first) * columns * 4)

    return body


def _row_dot(stored: Rows, tokens: int) -> Any:
    """Intrinsic: one row of the weight times `tokens` rows of x.

    Per group, 16 lanes at a time: acc[t] += (code - zero) · x[t]; then
    sum[t] += scale · acc[t]; at the end out[t] = the lanes of sum[t] added up, and the
    kept weights' products.
    """
    row_type = stored.row_type

    @intrinsic
    def row_dot(typing_context, row, sizes, places):
        def codegen(context, builder, signature, arguments):
            row = stored.unpack(builder, arguments[0])
            sizes = cgutils.unpack_tuple(builder, arguments[1])
            x, x_stride, out, out_stride = cgutils.unpack_tuple(builder, arguments[2])
            lines = [
                builder.add(x, builder.mul(x_stride, I64(token)))
                for token in range(tokens)
            ]
            sums = [zeroed(builder) for _ in lines]
            with _each_group(builder, stored, row, sizes) as (steps, zero, scale):
                partial = [zeroed(builder) for _ in lines]
                with _each_step(builder, stored, row, steps, zero) as parts:
                    for line, acc in zip(lines, partial, strict=True):
                        for offset, weight in parts:
                            place = builder.add(line, offset)
                            values = at(builder, place, I64(0), FLOATS)
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
            with each_outlier(builder, row, stored.dtype) as (column, value):
                for line, target in zip(lines, targets, strict=True):
                    total = at(builder, target, I64(0), F32)
                    x = at(builder, line, column, F32)
                    put(builder, target, multiply_add(builder, value, x, total))
            return context.get_dummy_value()

        return types.void(
            row_type, _SIZES_TYPE, types.UniTuple(types.int64, 4)
        ), codegen

    return row_dot


def _row_values(stored: Rows) -> Any:
    """Intrinsic: store one row of the weight as floats."""
    row_type = stored.row_type

    @intrinsic
    def row_values(typing_context, row, sizes, out):
        def codegen(context, builder, signature, arguments):
            row = stored.unpack(builder, arguments[0])
            sizes, out = cgutils.unpack_tuple(builder, arguments[1]), arguments[2]
            with (
                _each_group(builder, stored, row, sizes) as (steps, zero, scale),
                _each_step(builder, stored, row, steps, zero) as parts,
            ):
                for offset, weight in parts:
                    put(builder, builder.add(out, offset), builder.fmul(weight, scale))
            with each_outlier(builder, row, stored.dtype) as (column, value):
                place = builder.add(out, builder.mul(column, I64(4)))
                low = at(builder, place, I64(0), F32)
                put(builder, place, builder.fadd(low, value))
            return context.get_dummy_value()

        return types.void(row_type, _SIZES_TYPE, types.int64), codegen

    return row_values


@contextmanager
def _each_group(
    builder: Any, stored: Rows, row: Row, sizes: list[Any]
) -> Iterator[tuple[tuple[Any, Any], Any, Any]]:
    """Loop over groups: the bounds of its steps; zero-point and scale in all lanes."""
    groups, steps = sizes
    with cgutils.for_range(builder, groups, intp=I64) as group:

        def load(base: Any, kind: Any) -> Any:
            return at(builder, base, group.index, kind)

        scale, zero = stored.grid(builder, row, load)
        first = builder.mul(group.index, steps)
        bounds = first, builder.add(first, steps)
        yield bounds, splat(builder, zero, WORDS), splat(builder, scale, FLOATS)


@contextmanager
def _each_step(
    builder: Any, stored: Rows, row: Row, bounds: tuple[Any, Any], zero: Any
) -> Iterator[list[tuple[Any, Any]]]:
    """Loop over a group's steps: byte offsets in a float row, and code - zero there."""
    with cgutils.for_range_slice(builder, *bounds, I64(1), I64) as (index, _):
        first = builder.mul(index, I64(stored.step * 4))
        yield [
            (builder.add(first, I64(number * LANES * 4)), weight)
            for number, weight in enumerate(stored.floats(builder, row, index, zero))
        ]
