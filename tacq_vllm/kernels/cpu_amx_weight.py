"""LLVM code that unpacks 16 rows of a weight to tiles in bfloat16, kept weights too."""

import math
from dataclasses import dataclass
from typing import Any

import numba
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from tacq_vllm.kernels.cpu_amx_tiles import (
    ROWS,
    TILE_BYTES,
    chunk_steps,
    last_halvings,
    put_steps,
    round_both,
)
from tacq_vllm.kernels.cpu_chunks import ChunkReader, chunk_asker
from tacq_vllm.kernels.cpu_ir import (
    FLOATS,
    I8,
    I16,
    I32,
    I64,
    LANES,
    WORDS,
    at,
    call,
    from_float,
    multiply_add,
    pick,
    pick_both,
    put,
    to_float,
)

BYTES = ir.VectorType(I8, 4 * LANES)

_QUARTER = LANES // 4
"""Lanes of a quarter of a vector, in which bytes are looked up."""


@dataclass(frozen=True)
class AmxWeight:
    """What rows of a weight become: for every chunk of 16 rows the tiles of its steps.

    Weights are rounded to bfloat16. Behind the last column are zeros.
    """

    reader: ChunkReader

    @property
    def steps(self) -> list[list[int]]:
        """Columns of a chunk that are multiplied together."""
        return chunk_steps(self.reader.rows.stride)

    @property
    def chunk_bytes(self) -> int:
        """Of the tiles of a chunk of 16 rows."""
        return len(self.steps) * TILE_BYTES

    def places(self) -> list[int]:
        """Where in the tiles of a chunk a column of the first row lies, in bytes."""
        places = {
            column: step * TILE_BYTES + 2 * number
            for step, columns in enumerate(self.steps)
            for number, column in enumerate(columns)
        }
        return [places[column] for column in range(self.reader.columns)]


def unpacker(weight: AmxWeight) -> Any:
    """Compile what makes the tiles of some chunks of 16 rows.

    It takes the tensors' addresses; the first row; the first chunk, and the one that
    follows the last; the numbers of columns, groups and rows of the weight; the address
    of the tiles, with room for whole chunks; that of memory for a word a row, kept
    from the chunks before; and the first row and chunk of those that come next, which
    are asked for. The last row is repeated for those behind.
    """
    reader = weight.reader
    row_at, ask = reader.rows.finder(), chunk_asker(reader.rows)
    read, add_kept = _read_row(weight), _kept_adder(weight)
    width, chunk_bytes = reader.columns, weight.chunk_bytes
    halve = last_halvings(width, len(weight.steps))

    @numba.njit
    def unpack(tensors, first, chunk, end, columns, groups, rows, tiles, kept, ahead):
        halvings, last = halve(columns), columns // width
        for number in range(ROWS):
            row = min(first + number, rows - 1)
            packed = row_at(tensors, row, columns, groups, rows)
            coming = row_at(tensors, ahead[0] + number, columns, groups, rows)
            place = tiles + number * 64
            for index in range(chunk, end):
                offset = index - chunk
                ask(coming, ahead[1] + offset)
                read(packed, index, columns, place + offset * chunk_bytes, halvings)
            add_kept(packed, chunk, end, last, halvings, place, kept + number * 4)

    return unpack


def _read_row(weight: AmxWeight) -> Any:
    """Intrinsic: a chunk of one row, to the rows of its tiles."""
    reader = weight.reader

    @intrinsic
    def read_row(typing_context, row, index, columns, tiles, halvings):
        def codegen(context, builder, signature, arguments):
            row = reader.rows.unpack(builder, arguments[0])
            index, columns, tiles, halvings = arguments[1:]
            whole = builder.udiv(columns, I64(reader.columns))
            rest = builder.urem(columns, I64(reader.columns))

            def read(rest: Any, halvings: Any) -> None:
                steps = _weights(builder, reader, row, index, rest)
                put_steps(builder, tiles, steps, halvings)

            is_whole = builder.icmp_unsigned("<", index, whole)
            with builder.if_else(is_whole) as (then, otherwise):
                with then:
                    read(None, None)
                with otherwise:
                    read(rest, halvings)
            return context.get_dummy_value()

        number = types.int64
        row_type = reader.rows.row_type
        return types.void(row_type, number, number, number, number), codegen

    return read_row


def _weights(
    builder: Any, reader: ChunkReader, row: Any, index: Any, rest: Any
) -> list[Any]:
    """A row's weights in a chunk, a vector for every step."""
    scale, zero = reader.grid(builder, row, index, rest)
    # Exact: the one has 11 bits at most, the other 4.
    shift = builder.fneg(builder.fmul(scale, builder.sitofp(zero, FLOATS)))
    # Neighbouring lanes of a quarter that are sure to be of one group.
    lanes = math.gcd(_QUARTER, reader.group_size // reader.span)
    tables = [
        _tables(builder, reader.rows.levels, scale, shift, first)
        for first in range(0, _QUARTER, lanes)
    ]
    steps = []
    for codes in reader.rows.codes(builder, row, index, rest):
        low, high = (
            _look_up(builder, list(parts), builder.bitcast(codes, BYTES))
            for parts in zip(*tables, strict=True)
        )
        for first in (0, 8):
            order = [
                quarter + first + byte + part
                for quarter in range(0, 64, 16)
                for byte in range(8)
                for part in (0, 64)
            ]
            steps.append(builder.bitcast(pick_both(builder, low, high, order), WORDS))
    return steps


def _tables(
    builder: Any, levels: int, scale: Any, shift: Any, first: int
) -> tuple[Any, Any]:
    """What codes of one lane in each four stand for: the low bytes, and the high ones.

    A quarter of a vector of bytes is a table of 16, for the codes in the same quarter.
    Numbers are code · scale + shift, in bfloat16.

    Args:
        builder: what appends instructions.
        levels: how many codes there are.
        scale: of every lane.
        shift: of every lane.
        first: which of the four lanes.
    """
    lanes = [lane // _QUARTER * _QUARTER + first for lane in range(LANES)]
    scale, shift = pick(builder, scale, lanes), pick(builder, shift, lanes)
    values = []
    for code in range(0, levels, _QUARTER):
        codes = [float(code + lane % _QUARTER) for lane in range(LANES)]
        values.append(multiply_add(builder, ir.Constant(FLOATS, codes), scale, shift))
    # Of four codes in each quarter, then of the next four, two bytes each.
    pairs = [
        builder.bitcast(round_both(builder, *pair), BYTES)
        for pair in zip(values[::2], values[1::2] or values, strict=True)
    ]
    places = [
        32 * (code // 4) + 8 * quarter + 2 * (code % 4)
        for quarter in range(4)
        for code in (number % levels for number in range(16))
    ]
    low, high = (
        pick_both(builder, pairs[0], pairs[-1], [place + part for place in places])
        for part in (0, 1)
    )
    return low, high


def _look_up(builder: Any, tables: list[Any], codes: Any) -> Any:
    """The bytes of codes, whose lanes have the tables in turn, as many each."""
    found = [
        call(builder, "llvm.x86.avx512.pshuf.b.512", BYTES, [table, codes])
        for table in tables
    ]
    bytes_each = 16 // len(tables)
    result = found[0]
    for number, other in enumerate(found):
        order = [byte + 64 * (byte % 16 // bytes_each == number) for byte in range(64)]
        result = pick_both(builder, result, other, order)
    return result


def _kept_adder(weight: AmxWeight) -> Any:
    """Compile what adds a row's kept weights in some chunks to the rows of their tiles.

    It takes the row, the chunks, the chunk whose steps are folded, how often, the
    tiles, and the address of a word: the number of the first kept weight that is not in
    the chunks before.
    """
    bounds, column_of = _kept_bounds(weight), _kept_column(weight)
    place_of, add = _column_place(weight), _add_kept(weight)
    load, store = _load_number(), _store_number()
    width, chunk_bytes = weight.reader.columns, weight.chunk_bytes

    @numba.njit
    def add_kept(row, chunk, end, folded, halvings, tiles, next_kept):
        first, last = bounds(row)
        index = first if chunk == 0 else load(next_kept)
        while index < last:
            column = column_of(row, index)
            if column >= end * width:
                break
            number = column // width
            place = place_of(column - number * width)
            if number == folded:
                step = place // TILE_BYTES
                part = step & ((1 << halvings) - 1)
                place -= step * TILE_BYTES
                place += (step >> halvings) * TILE_BYTES + part * (64 >> halvings)
            add(row, index, tiles + (number - chunk) * chunk_bytes + place)
            index += 1
        store(next_kept, index)

    return add_kept


def _kept_bounds(weight: AmxWeight) -> Any:
    """Intrinsic: numbers of a row's first kept weight, and of the next row's."""
    rows = weight.reader.rows
    result = types.UniTuple(types.int64, 2)

    @intrinsic
    def kept_bounds(typing_context, row):
        def codegen(context, builder, signature, arguments):
            offsets = rows.unpack(builder, arguments[0]).offsets
            bounds = [
                builder.zext(at(builder, offsets, I64(number), I32), I64)
                for number in (0, 1)
            ]
            return context.make_tuple(builder, result, bounds)

        return result(rows.row_type), codegen

    return kept_bounds


def _kept_column(weight: AmxWeight) -> Any:
    """Intrinsic: the column of a kept weight."""
    rows = weight.reader.rows

    @intrinsic
    def kept_column(typing_context, row, index):
        def codegen(context, builder, signature, arguments):
            entries = rows.unpack(builder, arguments[0]).entries
            entry = at(builder, entries, arguments[1], I32)
            return builder.zext(builder.and_(entry, I32(0xFFFF)), I64)

        return types.int64(rows.row_type, types.int64), codegen

    return kept_column


def _column_place(weight: AmxWeight) -> Any:
    """Intrinsic: where a column of a whole chunk lies in its first row, in bytes."""
    kind = ir.ArrayType(I16, weight.reader.columns)
    places = ir.Constant(kind, weight.places())

    @intrinsic
    def column_place(typing_context, column):
        def codegen(context, builder, signature, arguments):
            table = cgutils.global_constant(builder.module, "column_places", places)
            place = at(builder, builder.ptrtoint(table, I64), arguments[0], I16)
            return builder.zext(place, I64)

        return types.int64(types.int64), codegen

    return column_place


def _add_kept(weight: AmxWeight) -> Any:
    """Intrinsic: add a kept weight to the one at an address."""
    rows = weight.reader.rows

    @intrinsic
    def add_kept(typing_context, row, index, place):
        def codegen(context, builder, signature, arguments):
            entries = rows.unpack(builder, arguments[0]).entries
            index, place = arguments[1:]
            entry = at(builder, entries, index, I32)
            stored = builder.trunc(builder.lshr(entry, I32(16)), I16)
            before = at(builder, place, I64(0), I16)
            total = builder.fadd(
                to_float(builder, before, torch.bfloat16),
                to_float(builder, stored, rows.dtype),
            )
            put(builder, place, from_float(builder, total, torch.bfloat16))
            return context.get_dummy_value()

        number = types.int64
        return types.void(rows.row_type, number, number), codegen

    return add_kept


def _load_number() -> Any:
    """Intrinsic: the word at an address."""

    @intrinsic
    def load(typing_context, place):
        def codegen(context, builder, signature, arguments):
            return builder.zext(at(builder, arguments[0], I64(0), I32), I64)

        return types.int64(types.int64), codegen

    return load


def _store_number() -> Any:
    """Intrinsic: store a word at an address."""

    @intrinsic
    def store(typing_context, place, number):
        def codegen(context, builder, signature, arguments):
            place, number = arguments
            put(builder, place, builder.trunc(number, I32))
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), codegen

    return store
