"""LLVM code that reads rows whose codes are clusters (SPEC.md, "Clusters").

Two blocks, 192 columns, are 64 clusters: a vector of bytes holds a cluster's three
fields in each, another their indices. From these come three vectors of codes, one for
each place in a cluster, with 4 added so that they have no sign.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import numba
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils

from tacq_vllm.format.clustered import ClusteredLinear
from tacq_vllm.format.clusters import BLOCK, BLOCK_WORDS, CLUSTER, WIDE
from tacq_vllm.kernels.cpu_ir import (
    I8,
    I16,
    I32,
    I64,
    WORDS,
    load_some,
    pick,
    prefetch,
    same,
    shift_words,
    to_float,
)
from tacq_vllm.kernels.cpu_rows import CpuWeight, Load, weight_kind

_SET_BLOCKS = 2

_ZERO = -WIDE[0]
"""What is added to codes."""


def clusters_weight(linear: ClusteredLinear) -> CpuWeight:
    """The weight as the kernels take it; x is padded to whole blocks."""
    columns = linear.qweight.shape[1] // BLOCK_WORDS * BLOCK
    shape = linear.out_features, columns, linear.scales.shape[1]
    return CpuWeight(
        weight_kind(ClusterRows, (linear.scales.dtype,), *shape),
        (
            linear.qweight.data_ptr(),
            linear.scales.data_ptr(),
            linear.outliers.data_ptr(),
        ),
    )


@dataclass(frozen=True)
class ClusterRow:
    """LLVM values: addresses of one row's parts."""

    words: Any
    scales: Any
    offsets: Any
    entries: Any


@dataclass(frozen=True)
class ClusterRows:
    """Reads rows of clusters; see `Rows`."""

    dtype: torch.dtype

    stride: ClassVar[int] = CLUSTER
    addresses: ClassVar[int] = 3
    levels: ClassVar[int] = WIDE[1] - WIDE[0] + 1
    row_type: ClassVar[Any] = types.UniTuple(types.int64, len(fields(ClusterRow)))

    def finder(self) -> Any:
        """See `Rows`."""

        @numba.njit(inline="always")
        def row_at(a, row, columns, groups, rows):
            return (
                a[0] + row * (columns // BLOCK * (BLOCK_WORDS * 4)),
                a[1] + row * groups * 2,
                a[2] + row * 4,
                a[2] + (rows + 1) * 4,
            )

        return row_at

    def unpack(self, builder: Any, values: Any) -> ClusterRow:
        """See `Rows`."""
        return ClusterRow(*cgutils.unpack_tuple(builder, values))

    def codes(self, builder: Any, row: ClusterRow, index: Any, rest: Any) -> list[Any]:
        """See `Rows`."""
        valid = None if rest is None else builder.udiv(rest, I64(BLOCK))
        codes = _codes(builder, row, index, valid)
        return [builder.bitcast(place, WORDS) for place in codes]

    def prefetch(self, builder: Any, row: ClusterRow, index: Any) -> None:
        """See `Rows`."""
        place, size = _place(builder, row, index)
        prefetch(builder, place, size)

    def grid(self, builder: Any, row: ClusterRow, load: Load) -> tuple[Any, Any]:
        """See `Rows`."""
        stored = load(row.scales, I16)
        is_vector = isinstance(stored.type, ir.VectorType)
        kind = ir.VectorType(I32, stored.type.count) if is_vector else I32
        return to_float(builder, stored, self.dtype), same(kind, _ZERO)


def _codes(builder: Any, row: ClusterRow, index: Any, valid: Any) -> list[Any]:
    """The codes, with `_ZERO` added, of each place in the clusters of a set's blocks.

    Args:
        builder: what appends instructions.
        row: the row.
        index: the set's number.
        valid: how many of the blocks exist; None: all.

    Returns:
        Three vectors of bytes, one for every cluster.
    """
    quarters = _load(builder, row, index, valid)
    fields = _cluster_fields(builder, quarters)
    indices = _cluster_indices(builder, quarters)
    narrow, *zeroed = (
        builder.icmp_unsigned("==", indices, same(indices.type, number))
        for number in range(CLUSTER + 1)
    )
    select = builder.select
    # Below, other bits than those named are of no account.
    low = [_moved(builder, fields, 2 * place) for place in range(CLUSTER)]
    # The zeroed weight's field in bits 0 and 1; then either of these in bit 2.
    shared = select(zeroed[0], low[0], select(zeroed[1], low[1], low[2]))
    first, second = (_moved(builder, shared, -shift) for shift in (2, 1))
    of_wide = first, select(zeroed[0], first, second), second
    none = same(fields.type, _ZERO)
    codes = []
    for place in range(CLUSTER):
        own = _moved(builder, fields, 2 * place - 1)
        high = select(narrow, own, of_wide[place])
        # 4 is added, and a negative code's high bit stands for -4.
        positive = builder.and_(builder.not_(high), none)
        kept = builder.and_(low[place], same(fields.type, 3))
        codes.append(select(zeroed[place], none, builder.or_(kept, positive)))
    return codes


def _place(builder: Any, row: ClusterRow, index: Any) -> tuple[Any, int]:
    """The address of a set's words, and their bytes."""
    size = 4 * BLOCK_WORDS * _SET_BLOCKS
    return builder.add(row.words, builder.mul(index, I64(size))), size


def _load(builder: Any, row: ClusterRow, index: Any, valid: Any) -> Any:
    """The words of a set, in parts of 16 bytes: 48 columns' fields and indices.

    Of blocks that do not exist they are 0.
    """
    place, _ = _place(builder, row, index)
    if valid is None:
        valid = I64(_SET_BLOCKS)
    kind = ir.VectorType(I32, 8 * _SET_BLOCKS)
    words = load_some(builder, place, kind, builder.mul(valid, I64(BLOCK_WORDS)))
    order = [
        BLOCK_WORDS * block + word
        for block in range(_SET_BLOCKS)
        for word in (0, 1, 2, 6, 3, 4, 5, 6)
    ]
    return builder.bitcast(
        pick(builder, words, order), ir.VectorType(I8, 32 * _SET_BLOCKS)
    )


def _cluster_fields(builder: Any, parts: Any) -> Any:
    """The three fields of every cluster in the low bits of a byte."""
    # A pair of clusters has 12 bits, which begin in the middle of every other byte.
    pairs = _pairs(builder, parts, lambda part, pair: (12 * pair // 8, 1), [0, 4])
    low = builder.and_(pairs, same(pairs.type, 0x003F))
    high = builder.and_(
        builder.shl(pairs, same(pairs.type, 2)), same(pairs.type, 0x3F00)
    )
    return builder.bitcast(builder.or_(low, high), parts.type)


def _cluster_indices(builder: Any, parts: Any) -> Any:
    """The index of every cluster, in bytes."""
    pairs = _pairs(
        builder,
        parts,
        lambda part, pair: (12 + part % 2 * 2 + pair // 4, 0),
        [0, 2, 4, 6],
    )
    indices = builder.and_(pairs, same(pairs.type, 0x0303))
    return builder.bitcast(indices, parts.type)


def _pairs(
    builder: Any,
    parts: Any,
    find: Callable[[int, int], tuple[int, int]],
    shifts: list[int],
) -> Any:
    """Two bytes for every pair of clusters, shifted to the right by turns.

    Of a part and a pair of its eight, `find` gives the first byte within the part, and
    how far behind it the second is.
    """
    order = []
    for part in range(parts.type.count // 16):
        for pair in range(8):
            first, distance = find(part, pair)
            order += [16 * part + first, 16 * part + first + distance]
    kind = ir.VectorType(I16, parts.type.count // 2)
    pairs = builder.bitcast(pick(builder, parts, order), kind)
    turns = kind.count // len(shifts)
    return builder.lshr(pairs, ir.Constant(kind, shifts * turns))


def _moved(builder: Any, values: Any, shift: int) -> Any:
    """Bytes shifted to the right, or by a negative count to the left.

    Bits that come from a neighbouring byte are to be masked out.
    """
    words = builder.bitcast(values, ir.VectorType(I32, values.type.count // 4))
    return builder.bitcast(shift_words(builder, words, shift), values.type)
