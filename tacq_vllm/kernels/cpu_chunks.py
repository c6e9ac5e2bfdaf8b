"""LLVM code that unpacks chunks of a row into bytes or floats, and their grid.

A chunk is a set of columns as `Rows` reads it: a lane of 32 bits has a few neighbouring
columns, and lies inside one group.
"""

from dataclasses import dataclass
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from tacq_vllm.kernels.cpu_ir import (
    FLOATS,
    I16,
    I32,
    I64,
    LANES,
    WORDS,
    at,
    load_some,
    pick,
    same,
    shift_words,
    splat,
)
from tacq_vllm.kernels.cpu_rows import Rows, WeightKind

AHEAD = 32
"""Chunks of a row after which one is best asked for before it is read."""

_MANTISSA = 23
"""Bits of a float behind its exponent."""

_EXPONENT_BIAS = 127


@dataclass(frozen=True)
class ChunkReader:
    """Reads chunks of rows."""

    rows: Rows
    group_size: int
    """Columns of a group, whole lanes; 0: the whole row."""

    @property
    def span(self) -> int:
        """Columns of a lane."""
        return 4 * self.rows.stride

    @property
    def columns(self) -> int:
        """Columns of a chunk: of all lanes of a vector."""
        return LANES * self.span

    @property
    def lane_order(self) -> list[int]:
        """Columns of a lane in the order in which `floats` has them."""
        stride = self.rows.stride
        return [word + stride * byte for word in range(stride) for byte in range(4)]

    def floats(
        self, builder: Any, row: Any, index: Any, rest: Any, zero: Any
    ) -> list[Any]:
        """The codes of a chunk less zero-points: floats, a vector for each column.

        Those for byte 0 to 3 of the first word of every lane, then of the next.

        Args:
            builder: what appends instructions.
            row: the row.
            index: the chunk's number.
            rest: how many of its columns exist; None: all.
            zero: the zero-points of its lanes.
        """
        words = self.rows.codes(builder, row, index, rest)
        return _differences(builder, words, builder.sitofp(zero, FLOATS))

    def grid(self, builder: Any, row: Any, index: Any, rest: Any) -> tuple[Any, Any]:
        """Of every lane of a chunk: the scale, a float, and the zero-point, a word."""
        size = self.group_size
        if size % self.columns == 0:
            group = builder.udiv(index, I64(size // self.columns)) if size else I64(0)

            def load(base: Any, kind: Any) -> Any:
                return at(builder, base, group, kind)

        elif self.columns % size == 0:
            count = self.columns // size
            first = builder.mul(index, I64(count))
            valid = None if rest is None else builder.udiv(rest, I64(size))

            def load(base: Any, kind: Any) -> Any:
                return _some(builder, base, first, ir.VectorType(kind, count), valid)

        else:
            groups = self._lane_groups(builder, index, rest)

            def load(base: Any, kind: Any) -> Any:
                return _each(builder, base, groups, kind)

        scale, zero = self.rows.grid(builder, row, load)
        return _to_lanes(builder, scale, FLOATS), _to_lanes(builder, zero, WORDS)

    def _lane_groups(self, builder: Any, index: Any, rest: Any) -> list[Any]:
        """The group of every lane; of those after the row's end the last one."""
        first = builder.mul(index, I64(LANES))
        last = I64(LANES - 1)
        if rest is not None:
            last = builder.sub(builder.udiv(rest, I64(self.span)), I64(1))
        groups = []
        for number in range(LANES):
            is_there = builder.icmp_unsigned("<", I64(number), last)
            lane = builder.add(first, builder.select(is_there, I64(number), last))
            groups.append(builder.udiv(lane, I64(self.group_size // self.span)))
        return groups


def chunk_reader(kind: WeightKind) -> ChunkReader:
    """What reads weights of a kind."""
    return ChunkReader(kind.rows, 0 if kind.groups == 1 else kind.group_size)


def chunk_asker(rows: Rows) -> Any:
    """Intrinsic: ask for the codes of a chunk of a row; neither need exist."""

    @intrinsic
    def ask(typing_context, row, index):
        def codegen(context, builder, signature, arguments):
            row, index = arguments
            rows.prefetch(builder, rows.unpack(builder, row), index)
            return context.get_dummy_value()

        return types.void(rows.row_type, types.int64), codegen

    return ask


def _some(builder: Any, base: Any, first: Any, kind: Any, valid: Any) -> Any:
    """Elements from `first` on; those after the row's end are zero."""
    size = 2 if kind.element is I16 else 4
    place = builder.add(base, builder.mul(first, I64(size)))
    if valid is None:
        return at(builder, place, I64(0), kind)
    return load_some(builder, place, kind, valid)


def _each(builder: Any, base: Any, indices: list[Any], kind: Any) -> Any:
    """Elements of an array at an address, as a vector."""
    vector = ir.Constant(ir.VectorType(kind, len(indices)), ir.Undefined)
    for number, index in enumerate(indices):
        element = at(builder, base, index, kind)
        vector = builder.insert_element(vector, element, I32(number))
    return vector


def _to_lanes(builder: Any, value: Any, kind: Any) -> Any:
    """Spread a number, or the elements of a vector, over the lanes."""
    if not isinstance(value.type, ir.VectorType):
        return splat(builder, value, kind)
    count = value.type.count
    return pick(builder, value, [lane * count // LANES for lane in range(LANES)])


def _differences(builder: Any, words: list[Any], zero: Any) -> list[Any]:
    """Codes in bytes, less zero-points, as floats.

    A code stays where it is, in the last bits of a float of which they count one.
    """
    low, middle, high = ((8 * byte, _MANTISSA - 8 * byte) for byte in range(3))
    # What is in the last byte would be in the exponent.
    shifts = (0, low), (0, middle), (0, high), (24, low)
    minuends = {
        exponent: builder.fadd(zero, same(FLOATS, 2.0**exponent))
        for _, exponent in (low, middle, high)
    }
    vectors = []
    for word in words:
        for shift, (place, exponent) in shifts:
            shifted = shift_words(builder, word, shift)
            code = builder.and_(shifted, same(WORDS, 0xF << place))
            bits = (_EXPONENT_BIAS + exponent) << _MANTISSA
            value = builder.bitcast(builder.or_(code, same(WORDS, bits)), FLOATS)
            vectors.append(builder.fsub(value, minuends[exponent]))
    return vectors
