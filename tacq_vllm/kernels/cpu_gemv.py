"""LLVM code of the product with few rows of x, through numba.

What is made of x lies in the order in which a chunk of the weight is unpacked, so that
nothing of the weight has to move. Kept weights are multiplied with x as it is.
"""

from typing import Any

import numba
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from tacq_vllm.kernels.cpu_call import AREAS, ARGUMENTS
from tacq_vllm.kernels.cpu_chunks import AHEAD
from tacq_vllm.kernels.cpu_ir import (
    I64,
    LANES,
    Team,
    lane_sums,
    put,
    put_tokens,
    reserver,
    sharer,
    sum_slots,
)
from tacq_vllm.kernels.cpu_kept import add_kept
from tacq_vllm.kernels.cpu_lanes import Lanes

_ROWS = 16
"""Rows of the weight that pass by a part of x while that is in the first cache."""

_AREAS_TYPE = types.UniTuple(types.int64, AREAS)


def compile_gemv(lanes: Lanes, team: Team) -> Any:
    """Compile out[t, r] = x[t] · W[r] for at most one tile of rows of x.

    Args:
        lanes: what x becomes.
        team: where the calling thread is.

    Returns:
        A C function void(int64 *arguments) with an `address`, to be called by every
        thread of a team; a row of the weight belongs to one thread.
    """
    reader = lanes.reader
    share, row_at = sharer(team), reader.rows.finder()
    arrange = lanes.arranger(team)
    size, width, x_size = lanes.tile * LANES * 4, reader.columns, lanes.dtype.itemsize
    part_size, distance = _part_size(lanes.part), _distance(width)
    reserve = reserver(_ROWS * size)
    head = len(ARGUMENTS)
    arguments = head + reader.rows.addresses
    add_chunks, finish = _add_chunks(lanes), _finish(lanes)

    @numba.cfunc(types.void(types.voidptr))
    def body(pointer):
        a = numba.carray(pointer, arguments, numba.int64)
        weight = a[head:]
        arrange(a)
        x, out, tokens, columns, groups, rows = a[0], a[5], a[6], a[7], a[8], a[9]
        whole = columns // width
        part = part_size(whole)
        areas = a[1], a[2], a[3], a[4]
        start, stop = share(0, rows)
        sums = reserve()
        for first in range(start, stop, _ROWS):
            last = min(first + _ROWS, stop)
            for chunk in range(0, whole, part):
                end = min(chunk + part, whole)
                ahead = distance(chunk, end, whole, columns)
                for row in range(first, last):
                    packed = row_at(weight, row, columns, groups, rows)
                    place = sums + (row - first) * size
                    add_chunks(packed, areas, chunk, end, ahead, place)
            for row in range(first, last):
                packed = row_at(weight, row, columns, groups, rows)
                place = sums + (row - first) * size
                source = x, columns * x_size, tokens
                target = out + row * x_size, rows
                finish(packed, areas, columns, place, source, target)

    return body


def _part_size(most: int) -> Any:
    """Compile how many chunks make a part, `most` at most: parts are nearly alike."""

    @numba.njit(inline="always")
    def part_size(whole):
        parts = max(1, (whole + most - 1) // most)
        return max(1, (whole + parts - 1) // parts)

    return part_size


def _distance(width: int) -> Any:
    """Compile after how many chunks of a part one is asked for before it is read."""

    @numba.njit(inline="always")
    def distance(first, last, whole, columns):
        if last < whole:
            # These rows go on with their next part.
            return last - first
        if first == 0:
            # Whole rows follow one another.
            return AHEAD
        # The next rows begin with their first part.
        return _ROWS * columns // width - first

    return distance


def _add_chunks(lanes: Lanes) -> Any:
    """Intrinsic: add the products of a row's whole chunks to its sums in memory.

    It takes the row, the areas, the first chunk, the one that follows the last, after
    how many chunks one is asked for before it is read, and the address of the sums.
    """
    reader, rows = lanes.reader, lanes.reader.rows

    @intrinsic
    def add_chunks(typing_context, row, areas, first, last, ahead, sums):
        def codegen(context, builder, signature, arguments):
            row = rows.unpack(builder, arguments[0])
            areas = cgutils.unpack_tuple(builder, arguments[1])
            first, last, ahead, sums = arguments[2:]
            places = _places(builder, sums, lanes.tile)
            slots = sum_slots(builder, places, first)
            with cgutils.for_range_slice(builder, first, last, I64(1), I64) as (i, _):
                rows.prefetch(builder, row, builder.add(i, ahead))
                grid = reader.grid(builder, row, i, None)
                lanes.add_chunk(builder, row, areas, i, None, grid, slots)
            for place, slot in zip(places, slots, strict=True):
                put(builder, place, builder.load(slot))
            return context.get_dummy_value()

        number = types.int64
        signature = types.void(
            rows.row_type, _AREAS_TYPE, number, number, number, number
        )
        return signature, codegen

    return add_chunks


def _finish(lanes: Lanes) -> Any:
    """Intrinsic: add the last columns and the kept weights, and store the results.

    It takes the row, the areas, the number of columns and the address of the sums; of
    x the address, the bytes of a row and the number of rows; of the output the address
    and the number of columns.
    """
    reader, tokens = lanes.reader, lanes.tile
    rows = reader.rows

    @intrinsic
    def finish(typing_context, row, areas, columns, sums, source, target):
        def codegen(context, builder, signature, arguments):
            row = rows.unpack(builder, arguments[0])
            areas = cgutils.unpack_tuple(builder, arguments[1])
            columns, sums = arguments[2:4]
            x, line_bytes, count = cgutils.unpack_tuple(builder, arguments[4])
            out, out_features = cgutils.unpack_tuple(builder, arguments[5])
            whole = builder.udiv(columns, I64(reader.columns))
            slots = sum_slots(builder, _places(builder, sums, tokens), whole)
            rest = builder.urem(columns, I64(reader.columns))
            with builder.if_then(builder.icmp_unsigned("!=", rest, I64(0))):
                grid = reader.grid(builder, row, whole, rest)
                lanes.add_chunk(builder, row, areas, whole, rest, grid, slots)
            lines = _lines(builder, x, line_bytes, count, tokens)
            add_kept(builder, row, rows.dtype, lines, lanes.dtype, slots)
            totals = lane_sums(builder, [builder.load(slot) for slot in slots])
            put_tokens(builder, out, out_features, totals, lanes.dtype)
            return context.get_dummy_value()

        number = types.int64
        source, target = types.UniTuple(number, 3), types.UniTuple(number, 2)
        signature = types.void(
            rows.row_type, _AREAS_TYPE, number, number, source, target
        )
        return signature, codegen

    return finish


def _places(builder: Any, sums: Any, tokens: int) -> list[Any]:
    """Where the sums of one row and each token lie."""
    return [builder.add(sums, I64(token * LANES * 4)) for token in range(tokens)]


def _lines(builder: Any, x: Any, line_bytes: Any, count: Any, tokens: int) -> list[Any]:
    """Where rows of x lie; the last is repeated for those behind."""
    lines = []
    last = builder.sub(count, I64(1))
    for token in range(tokens):
        is_there = builder.icmp_unsigned("<", I64(token), last)
        number = builder.select(is_there, I64(token), last)
        lines.append(builder.add(x, builder.mul(line_bytes, number)))
    return lines
