"""LLVM code that unpacks 16 rows of a weight so that a vector has a word of each.

A panel holds some blocks of columns of 16 rows. A block is a vector for every four
columns, whose lanes are the rows, and a vector of the rows' scales. Weights are bytes:
codes less zero-points, with a bias added so that they have no sign.
"""

from dataclasses import dataclass
from typing import Any

import numba
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from tacq_vllm.kernels.cpu_chunks import ChunkReader, chunk_asker
from tacq_vllm.kernels.cpu_dots import BIAS
from tacq_vllm.kernels.cpu_ir import (
    I8,
    I64,
    LANES,
    WORDS,
    at,
    put,
    reserver,
    same,
    transpose,
)

ROWS = LANES
"""Of a panel."""

PANELS = 3
"""Panels that are multiplied together."""


@dataclass(frozen=True)
class Panels:
    """What panels are like."""

    reader: ChunkReader

    block: int
    """Columns of a block: whole lanes of one group. A chunk has whole blocks."""

    @property
    def words(self) -> int:
        """Words of a row's block, or vectors of a panel's."""
        return self.block // 4

    @property
    def block_bytes(self) -> int:
        """Size of a block of a panel."""
        return 64 * (self.words + 1)

    @property
    def chunk_blocks(self) -> int:
        """Blocks of a chunk."""
        return self.reader.columns // self.block


def unpacker(panels: Panels) -> Any:
    """Compile what makes a panel of some chunks.

    It takes the tensors' addresses; the first row; the first chunk, and the one that
    follows the last; the numbers of columns, groups and rows of the weight; the address
    of the panel, with room for whole chunks; and the first row and chunk of those that
    come next, which are asked for. The last row is repeated for those behind.
    """
    reader = panels.reader
    row_at, ask = reader.rows.finder(), chunk_asker(reader.rows)
    read, turn = _read_row(panels), _turn_rows(panels)
    chunk_bytes = panels.chunk_blocks * panels.block_bytes
    reserve = reserver((reader.rows.stride + 1) * ROWS * 64)

    @numba.njit
    def unpack(weight, first, chunk, end, columns, groups, rows, panel, ahead):
        lines = reserve()
        for index in range(chunk, end):
            for number in range(ROWS):
                row = min(first + number, rows - 1)
                packed = row_at(weight, row, columns, groups, rows)
                coming = row_at(weight, ahead[0] + number, columns, groups, rows)
                ask(coming, ahead[1] + index - chunk)
                read(packed, index, columns, lines + number * 64)
            turn(lines, panel + (index - chunk) * chunk_bytes)

    return unpack


def _read_row(panels: Panels) -> Any:
    """Intrinsic: a chunk of one row, a vector for each word of a lane, and scales."""
    reader = panels.reader
    row_type = reader.rows.row_type

    @intrinsic
    def read_row(typing_context, row, index, columns, line):
        def codegen(context, builder, signature, arguments):
            row = reader.rows.unpack(builder, arguments[0])
            index, columns, line = arguments[1:]
            whole = builder.udiv(columns, I64(reader.columns))
            rest = builder.urem(columns, I64(reader.columns))

            def read(rest: Any) -> None:
                scale, weights = _weights(builder, panels, row, index, rest)
                for number, value in enumerate((*weights, scale)):
                    place = builder.add(line, I64(number * ROWS * 64))
                    put(builder, place, value)

            is_whole = builder.icmp_unsigned("<", index, whole)
            with builder.if_else(is_whole) as (then, otherwise):
                with then:
                    read(None)
                with otherwise:
                    read(rest)
            return context.get_dummy_value()

        number = types.int64
        return types.void(row_type, number, number, number), codegen

    return read_row


def _weights(
    builder: Any, panels: Panels, row: Any, index: Any, rest: Any
) -> tuple[Any, list[Any]]:
    """Scales of the lanes of a row's chunk, and weights as bytes."""
    reader = panels.reader
    scale, zero = reader.grid(builder, row, index, rest)
    shift = builder.sub(same(WORDS, BIAS), zero)
    byte_shift = builder.mul(
        builder.and_(shift, same(WORDS, 0xFF)), same(WORDS, 0x01010101)
    )
    bytes_type = ir.VectorType(I8, 64)
    added = builder.bitcast(byte_shift, bytes_type)
    weights = [
        builder.bitcast(builder.add(builder.bitcast(codes, bytes_type), added), WORDS)
        for codes in reader.rows.codes(builder, row, index, rest)
    ]
    return scale, weights


def _turn_rows(panels: Panels) -> Any:
    """Intrinsic: the chunk of a panel, from what was read of each row."""
    lanes = panels.block // panels.reader.span
    stride = panels.reader.rows.stride

    @intrinsic
    def turn_rows(typing_context, lines, panel):
        def codegen(context, builder, signature, arguments):
            lines, panel = arguments
            for word in range(stride + 1):
                first = builder.add(lines, I64(word * ROWS * 64))
                rows = [at(builder, first, I64(row), WORDS) for row in range(ROWS)]
                is_scale = word == stride
                for lane, values in enumerate(transpose(builder, rows)):
                    block, part = divmod(lane, lanes)
                    number = word * lanes + part
                    if is_scale and part:
                        continue
                    place = block * panels.block_bytes + 64 * number
                    put(builder, builder.add(panel, I64(place)), values)
            return context.get_dummy_value()

        number = types.int64
        return types.void(number, number), codegen

    return turn_rows
