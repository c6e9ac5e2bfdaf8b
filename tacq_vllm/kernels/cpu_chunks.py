"""LLVM code that unpacks a chunk of a packed row into bytes, and its grid into lanes.

64 bytes of a row's low plane hold the codes of a chunk of columns. Shifted and masked
where they are, they make vectors of 64 codes, one of every fourth column (4 bits: of
every second). A lane of 32 bits lies inside one group.
"""

from dataclasses import dataclass
from typing import Any

import torch
from llvmlite import ir

from tacq_vllm.format.packing import PLANE_WIDTHS
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
    same,
    splat,
)
from tacq_vllm.kernels.cpu_rounding import chunk_columns
from tacq_vllm.kernels.cpu_rows import PackedRow, load_grid


def supports_groups(bits: int, group_size: int, in_features: int) -> bool:
    """Whether a group and a chunk divide one another, or a row is one group."""
    chunk = chunk_columns(bits)
    whole = group_size == in_features
    return whole or chunk % group_size == 0 or group_size % chunk == 0


@dataclass(frozen=True)
class ChunkReader:
    """Reads chunks of rows that are packed in one way."""

    bits: int
    dtype: torch.dtype
    group_size: int
    """Columns of a group; 0: the whole row."""

    @property
    def columns(self) -> int:
        """Columns of a chunk."""
        return chunk_columns(self.bits)

    @property
    def groups(self) -> int:
        """Groups of a chunk; 0: a group is a chunk or more."""
        if self.group_size == 0 or self.group_size >= self.columns:
            return 0
        return self.columns // self.group_size

    def codes(self, builder: Any, row: PackedRow, index: Any, rest: Any) -> list[Any]:
        """The codes of a chunk, one per byte: four vectors of 64, of 4 bits two.

        Args:
            builder: what appends instructions.
            row: the row.
            index: the chunk's number.
            rest: how many of its columns exist; None: all.
        """
        width = PLANE_WIDTHS[self.bits][0]
        low = _plane(builder, row.low, index, rest, LANES, width)
        mask = same(WORDS, 0x01010101 * ((1 << width) - 1))
        codes = [
            builder.and_(_shifted(builder, low, shift), mask)
            for shift in range(0, 8, width)
        ]
        if self.bits != 3:
            return codes
        # Four columns' high bits to a byte, as the low plane has their codes.
        high = _plane(builder, row.high, index, rest, LANES // 2, 1)
        halves = ir.VectorType(I16, 32)
        wide = builder.zext(builder.bitcast(high, ir.VectorType(I8, 32)), halves)
        spread = builder.or_(wide, builder.shl(wide, same(halves, 4)))
        nibbles = builder.bitcast(spread, WORDS)
        return [
            builder.or_(
                code,
                builder.and_(
                    _shifted(builder, nibbles, number - 2), same(WORDS, 0x04040404)
                ),
            )
            for number, code in enumerate(codes)
        ]

    def grid(
        self, builder: Any, row: PackedRow, index: Any, rest: Any
    ) -> tuple[Any, Any]:
        """Scale and zero-point of every lane of a chunk, as floats."""
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
        floats = builder.uitofp(zero, scale.type)
        return _to_lanes(builder, scale), _to_lanes(builder, floats)


def _plane(
    builder: Any, base: Any, index: Any, rest: Any, words: int, width: int
) -> Any:
    """The words of one plane of a chunk; those after the row's end are zero."""
    kind = ir.VectorType(I32, words)
    if rest is None:
        return at(builder, base, index, kind)
    valid = builder.udiv(builder.mul(rest, I64(width)), I64(32))
    place = builder.add(base, builder.mul(index, I64(words * 4)))
    return load_some(builder, place, kind, valid)


def _some(builder: Any, base: Any, first: Any, kind: Any, valid: Any) -> Any:
    """Elements from `first` on; those after the row's end are zero."""
    size = 2 if kind.element is I16 else 4
    place = builder.add(base, builder.mul(first, I64(size)))
    if valid is None:
        return at(builder, place, I64(0), kind)
    return load_some(builder, place, kind, valid)


def _shifted(builder: Any, words: Any, count: int) -> Any:
    """Words shifted to the right, or by a negative count to the left."""
    if count == 0:
        return words
    shift = builder.lshr if count > 0 else builder.shl
    return shift(words, same(words.type, abs(count)))


def _to_lanes(builder: Any, value: Any) -> Any:
    """Spread a float, or the elements of a vector, over the lanes."""
    if not isinstance(value.type, ir.VectorType):
        return splat(builder, value, FLOATS)
    count = value.type.count
    return pick(builder, value, [lane * count // LANES for lane in range(LANES)])
