"""LLVM code that unpacks chunks of a packed row into bytes, and their grid into lanes.

Codes of 256 columns, shifted and masked where they are, make four vectors of 64 bytes:
vector k holds the columns k, k + 4, k + 8, …, so that each lane of 32 bits has 16
neighbouring columns. Where groups are larger, lanes of four such sets may be exchanged
until each has 64 neighbouring columns, so that integers are summed for longer. A lane
lies inside one group.
"""

from dataclasses import dataclass
from typing import Any

import torch
from llvmlite import ir

from tacq_vllm.kernels.cpu_ir import (
    FLOATS,
    I8,
    I16,
    I32,
    I64,
    LANES,
    WORDS,
    at,
    load_some,
    pick,
    pick_both,
    prefetch,
    same,
    splat,
)
from tacq_vllm.kernels.cpu_rows import PackedRow, load_grid

_AHEAD = 1024
"""Bytes by which memory is asked for before a plane of 1 bit is read."""

_SET = 256
"""Columns that are unpacked at once."""


def supports_groups(group_size: int, in_features: int) -> bool:
    """Whether a group and a chunk divide one another, or a row is one group."""
    whole = group_size == in_features
    return whole or _SET % group_size == 0 or group_size % _SET == 0


def lane_columns(group_size: int, in_features: int) -> int:
    """The most columns that a lane may have."""
    return 64 if group_size % 64 == 0 and in_features % 64 == 0 else 16


@dataclass(frozen=True)
class ChunkReader:
    """Reads chunks of rows that are packed in one way."""

    bits: int
    dtype: torch.dtype
    group_size: int
    """Columns of a group; 0: the whole row."""

    span: int
    """Columns of a lane: 16 or 64."""

    @property
    def columns(self) -> int:
        """Columns of a chunk: of all lanes of a vector."""
        return LANES * self.span

    @property
    def vectors(self) -> int:
        """Vectors of bytes that a chunk makes."""
        return self.span // 4

    @property
    def groups(self) -> int:
        """Groups of a chunk; 0: a group is a chunk or more."""
        if self.group_size == 0 or self.group_size >= self.columns:
            return 0
        return self.columns // self.group_size

    def codes(self, builder: Any, row: PackedRow, index: Any, rest: Any) -> list[Any]:
        """The codes of a chunk, one per byte.

        Args:
            builder: what appends instructions.
            row: the row.
            index: the chunk's number.
            rest: how many of its columns exist; None: all.
        """
        count = self.columns // _SET
        if count == 1:
            return self._set(builder, row, index, rest)
        sets = []
        for number in range(count):
            place = builder.add(builder.mul(index, I64(count)), I64(number))
            part = None if rest is None else _clamp(builder, rest, number * _SET)
            sets.append(self._set(builder, row, place, part))
        # Lane 4 g + q of set c goes to lane 4 c + g of the vectors of quarter q.
        return [
            _exchange(builder, [codes[number] for codes in sets], quarter)
            for quarter in range(4)
            for number in range(4)
        ]

    def _set(self, builder: Any, row: PackedRow, index: Any, rest: Any) -> list[Any]:
        """The codes of 256 columns: four vectors."""
        if self.bits == 4:
            return _nibbles(builder, _plane(builder, row.low, index, rest, 4))
        low = _plane(builder, row.low, index, rest, 2)
        codes = [_field(builder, low, shift, 0x03) for shift in (0, 2, 4, 6)]
        if self.bits == 2:
            return codes
        # Four columns' high bits to a byte, as the low plane has their codes.
        high = _plane(builder, row.high, index, rest, 1)
        halves = ir.VectorType(I16, 32)
        wide = builder.zext(builder.bitcast(high, ir.VectorType(I8, 32)), halves)
        spread = builder.or_(wide, builder.shl(wide, same(halves, 4)))
        nibbles = builder.bitcast(spread, WORDS)
        return [
            builder.or_(code, _field(builder, nibbles, number - 2, 0x04))
            for number, code in enumerate(codes)
        ]

    def grid(
        self, builder: Any, row: PackedRow, index: Any, rest: Any
    ) -> tuple[Any, Any]:
        """Of every lane of a chunk: the scale, a float, and the zero-point, a word."""
        count = self.groups
        if count == 0:
            group = I64(0)
            if self.group_size:
                chunks = self.group_size // self.columns
                group = builder.udiv(index, I64(chunks))

            def load(base: Any, kind: Any) -> Any:
                return at(builder, base, group, kind)

        else:
            first = builder.mul(index, I64(count))
            valid = None
            if rest is not None:
                valid = builder.udiv(rest, I64(self.group_size))

            def load(base: Any, kind: Any) -> Any:
                return _some(builder, base, first, ir.VectorType(kind, count), valid)

        scale, zero = load_grid(builder, row, self.bits, self.dtype, load)
        return _to_lanes(builder, scale, FLOATS), _to_lanes(builder, zero, WORDS)


def _clamp(builder: Any, rest: Any, first: int) -> Any:
    """How many columns of a set that begins at column `first` exist."""
    end = builder.select(
        builder.icmp_unsigned("<", rest, I64(first + _SET)), rest, I64(first + _SET)
    )
    begins = builder.icmp_unsigned(">", rest, I64(first))
    return builder.select(begins, builder.sub(end, I64(first)), I64(0))


def _exchange(builder: Any, vectors: list[Any], quarter: int) -> Any:
    """Every fourth lane of four vectors, from lane `quarter` on."""
    first, second = (
        pick_both(builder, a, b, list(range(quarter, 2 * LANES, 4)))
        for a, b in (vectors[:2], vectors[2:])
    )
    return pick_both(builder, first, second, list(range(LANES)))


def _plane(builder: Any, base: Any, index: Any, rest: Any, width: int) -> Any:
    """The words of one plane of a chunk; those after the row's end are zero."""
    kind = ir.VectorType(I32, _SET * width // 32)
    place = builder.add(base, builder.mul(index, I64(4 * kind.count)))
    if rest is None:
        for line in range(0, 4 * kind.count, 64):
            prefetch(builder, builder.add(place, I64(_AHEAD * width + line)))
        return at(builder, place, I64(0), kind)
    valid = builder.udiv(builder.mul(rest, I64(width)), I64(32))
    return load_some(builder, place, kind, valid)


def _nibbles(builder: Any, words: Any) -> list[Any]:
    """Codes of 4 bits: those of even and odd bytes go to different vectors."""
    halves, kept = ir.VectorType(I16, 64), ir.VectorType(I8, 64)
    pairs = builder.bitcast(words, halves)
    even, odd = (
        builder.bitcast(builder.trunc(part, kept), WORDS)
        for part in (pairs, builder.lshr(pairs, same(halves, 8)))
    )
    return [
        _field(builder, part, shift, 0x0F)
        for part, shift in ((even, 0), (even, 4), (odd, 0), (odd, 4))
    ]


def _some(builder: Any, base: Any, first: Any, kind: Any, valid: Any) -> Any:
    """Elements from `first` on; those after the row's end are zero."""
    size = 2 if kind.element is I16 else 4
    place = builder.add(base, builder.mul(first, I64(size)))
    if valid is None:
        return at(builder, place, I64(0), kind)
    return load_some(builder, place, kind, valid)


def _field(builder: Any, words: Any, shift: int, mask: int) -> Any:
    """Bytes shifted to the right, or by a negative count to the left, and masked."""
    if shift:
        move = builder.lshr if shift > 0 else builder.shl
        words = move(words, same(words.type, abs(shift)))
    return builder.and_(words, same(words.type, 0x01010101 * mask))


def _to_lanes(builder: Any, value: Any, kind: Any) -> Any:
    """Spread a number, or the elements of a vector, over the lanes."""
    if not isinstance(value.type, ir.VectorType):
        return splat(builder, value, kind)
    count = value.type.count
    return pick(builder, value, [lane * count // LANES for lane in range(LANES)])
