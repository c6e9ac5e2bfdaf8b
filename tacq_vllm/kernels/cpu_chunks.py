"""LLVM code that unpacks chunks of a row into bytes, and their grid into lanes.

A chunk is a set of columns as `Rows` reads it: a lane of 32 bits has a few neighbouring
columns, and lies inside one group.
"""

import functools
from dataclasses import dataclass
from typing import Any

from llvmlite import ir

from tacq_vllm.kernels.cpu_ir import (
    FLOATS,
    I16,
    I64,
    LANES,
    WORDS,
    at,
    load_some,
    pick,
    splat,
)
from tacq_vllm.kernels.cpu_rows import Rows, WeightKind


def lane_span(rows: Rows) -> int:
    """Columns of a lane."""
    return 4 * rows.stride


@functools.cache
def supports_groups(kind: WeightKind) -> bool:
    """Whether chunks can be read: groups are of whole lanes.

    A group and a chunk divide one another, or a row is one group.
    """
    span, size = lane_span(kind.rows), kind.group_size
    chunk = LANES * span
    divide = chunk % size == 0 or size % chunk == 0
    return size % span == 0 and (kind.groups == 1 or divide)


@dataclass(frozen=True)
class ChunkReader:
    """Reads chunks of rows."""

    rows: Rows
    group_size: int
    """Columns of a group; 0: the whole row."""

    ahead: int
    """Chunks after which one is asked for, before it is read."""

    @property
    def span(self) -> int:
        """Columns of a lane."""
        return lane_span(self.rows)

    @property
    def columns(self) -> int:
        """Columns of a chunk: of all lanes of a vector."""
        return LANES * self.span

    @property
    def groups(self) -> int:
        """Groups of a chunk; 0: a group is a chunk or more."""
        if self.group_size == 0 or self.group_size >= self.columns:
            return 0
        return self.columns // self.group_size

    def codes(self, builder: Any, row: Any, index: Any, rest: Any) -> list[Any]:
        """The codes of a chunk, one per byte: a vector for each word of a lane.

        Args:
            builder: what appends instructions.
            row: the row.
            index: the chunk's number.
            rest: how many of its columns exist; None: all.
        """
        if rest is None:
            self.rows.prefetch(builder, row, builder.add(index, I64(self.ahead)))
        return self.rows.codes(builder, row, index, rest)

    def grid(self, builder: Any, row: Any, index: Any, rest: Any) -> tuple[Any, Any]:
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

        scale, zero = self.rows.grid(builder, row, load)
        return _to_lanes(builder, scale, FLOATS), _to_lanes(builder, zero, WORDS)


def _some(builder: Any, base: Any, first: Any, kind: Any, valid: Any) -> Any:
    """Elements from `first` on; those after the row's end are zero."""
    size = 2 if kind.element is I16 else 4
    place = builder.add(base, builder.mul(first, I64(size)))
    if valid is None:
        return at(builder, place, I64(0), kind)
    return load_some(builder, place, kind, valid)


def _to_lanes(builder: Any, value: Any, kind: Any) -> Any:
    """Spread a number, or the elements of a vector, over the lanes."""
    if not isinstance(value.type, ir.VectorType):
        return splat(builder, value, kind)
    count = value.type.count
    return pick(builder, value, [lane * count // LANES for lane in range(LANES)])
