"""LLVM code that makes rows of a weight floats, through numba."""

from typing import Any

import numba
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from tacq_vllm.kernels.cpu_chunks import AHEAD, ChunkReader
from tacq_vllm.kernels.cpu_ir import (
    F32,
    FLOATS,
    I64,
    LANES,
    Team,
    at,
    pick,
    put,
    same,
    sharer,
    transpose,
)
from tacq_vllm.kernels.cpu_kept import each_kept
from tacq_vllm.kernels.cpu_rows import Row

ARGUMENTS = ("out", "out_features", "columns", "groups", "first_row", "last_row")
"""What the kernel is given, as 64-bit integers, before the addresses of a weight.

Rows from `first_row` to before `last_row` are worked on.
"""


def compile_dequantize(reader: ChunkReader, team: Team) -> Any:
    """Compile out[r - first_row] = W[r] in float32.

    Args:
        reader: reads the weight.
        team: where the calling thread is.

    Returns:
        A C function void(int64 *arguments) with an `address`, to be called by every
        thread of a team; a row belongs to one thread.
    """
    row_at, share = reader.rows.finder(), sharer(team)
    put_chunks, add_kept = _put_chunks(reader), _add_kept(reader)
    head = len(ARGUMENTS)
    arguments = head + reader.rows.addresses

    @numba.cfunc(types.void(types.voidptr))
    def body(pointer):
        a = numba.carray(pointer, arguments, numba.int64)
        weight = a[head:]
        out, rows, columns, groups, first = a[0], a[1], a[2], a[3], a[4]
        start, stop = share(first, a[5])
        for row in range(start, stop):
            packed = row_at(weight, row, columns, groups, rows)
            line = out + (row - first) * columns * 4
            put_chunks(packed, columns, line)
            add_kept(packed, line)

    return body


def _put_chunks(reader: ChunkReader) -> Any:
    """Intrinsic: store one row's chunks as floats."""

    @intrinsic
    def put_chunks(typing_context, row, columns, line):
        def codegen(context, builder, signature, arguments):
            row = reader.rows.unpack(builder, arguments[0])
            columns, line = arguments[1:]
            whole = builder.udiv(columns, I64(reader.columns))
            with cgutils.for_range(builder, whole, intp=I64) as chunk:
                ahead = builder.add(chunk.index, I64(AHEAD))
                reader.rows.prefetch(builder, row, ahead)
                _put_chunk(builder, reader, row, chunk.index, None, line)
            rest = builder.urem(columns, I64(reader.columns))
            with builder.if_then(builder.icmp_unsigned("!=", rest, I64(0))):
                _put_chunk(builder, reader, row, whole, rest, line)
            return context.get_dummy_value()

        number = types.int64
        return types.void(reader.rows.row_type, number, number), codegen

    return put_chunks


def _put_chunk(
    builder: Any, reader: ChunkReader, row: Row, index: Any, rest: Any, line: Any
) -> None:
    """Store a chunk of a row, a lane's columns after the other."""
    scale, zero = reader.grid(builder, row, index, rest)
    weights = reader.floats(builder, row, index, rest, zero)
    by_column = dict(zip(reader.lane_order, weights, strict=True))
    none = same(FLOATS, 0)
    vectors = [
        builder.fmul(by_column[column], scale) if column in by_column else none
        for column in range(LANES)
    ]
    lane_bytes = reader.span * 4
    first = builder.mul(index, I64(reader.columns * 4))
    for lane, values in enumerate(transpose(builder, vectors)):
        offset = builder.add(first, I64(lane * lane_bytes))
        place = builder.add(line, offset)
        columns = pick(builder, values, list(range(reader.span)))
        if rest is None:
            put(builder, place, columns)
            continue
        is_there = builder.icmp_unsigned("<", I64(lane * reader.span), rest)
        with builder.if_then(is_there):
            put(builder, place, columns)


def _add_kept(reader: ChunkReader) -> Any:
    """Intrinsic: add a row's kept weights to its floats."""
    rows = reader.rows

    @intrinsic
    def add_kept(typing_context, row, line):
        def codegen(context, builder, signature, arguments):
            row, line = rows.unpack(builder, arguments[0]), arguments[1]
            with each_kept(builder, row, rows.dtype) as (column, value):
                place = builder.add(line, builder.mul(column, I64(4)))
                low = at(builder, place, I64(0), F32)
                put(builder, place, builder.fadd(low, value))
            return context.get_dummy_value()

        return types.void(rows.row_type, types.int64), codegen

    return add_kept
