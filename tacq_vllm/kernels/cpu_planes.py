"""LLVM code that reads rows whose codes are in planes (SPEC.md, "Codes").

Codes of 256 columns, shifted and masked where they are, make four vectors of 64 bytes.
"""

from dataclasses import dataclass, fields
from typing import Any, ClassVar

import numba
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils

from tacq_vllm.format.linear import PackedLinear
from tacq_vllm.format.packing import PLANE_WIDTHS
from tacq_vllm.kernels.cpu_ir import (
    I8,
    I16,
    I32,
    I64,
    WORDS,
    at,
    byte_field,
    load_some,
    prefetch,
    same,
    splat,
    to_float,
)
from tacq_vllm.kernels.cpu_rows import CpuWeight, Load, weight_kind

_SET = 256
"""Columns of a set."""


def planes_weight(packed: PackedLinear) -> CpuWeight:
    """The weight as the kernels take it; x has in_features columns."""
    high, zeros_high = packed.qweight_high, packed.qzeros_high
    scales = packed.scales
    shape = packed.out_features, packed.in_features, scales.shape[1]
    return CpuWeight(
        weight_kind(PlaneRows, (packed.bits, scales.dtype), *shape),
        (
            packed.qweight.data_ptr(),
            0 if high is None else high.data_ptr(),
            scales.data_ptr(),
            packed.qzeros.data_ptr(),
            0 if zeros_high is None else zeros_high.data_ptr(),
            packed.outliers.data_ptr(),
        ),
    )


@dataclass(frozen=True)
class PlaneRow:
    """LLVM values: addresses of one row's parts, and where its zero-points begin."""

    low: Any
    high: Any
    scales: Any
    zeros: Any
    zero_shift: Any
    zeros_high: Any
    zero_high_shift: Any
    offsets: Any
    entries: Any


@dataclass(frozen=True)
class PlaneRows:
    """Reads rows of codes of some bits; see `Rows`."""

    bits: int
    dtype: torch.dtype

    stride: ClassVar[int] = 4
    addresses: ClassVar[int] = 6
    row_type: ClassVar[Any] = types.UniTuple(types.int64, len(fields(PlaneRow)))

    @property
    def levels(self) -> int:
        """See `Rows`."""
        return 1 << self.bits

    def finder(self) -> Any:
        """See `Rows`."""
        width = PLANE_WIDTHS[self.bits][0]

        @numba.njit(inline="always")
        def row_at(a, row, columns, groups, rows):
            return (
                a[0] + row * (columns * width // 8),
                a[1] + row * (columns // 8),
                a[2] + row * groups * 2,
                a[3] + (row * width >> 5) * groups * 4,
                row * width & 31,
                a[4] + (row >> 5) * groups * 4,
                row & 31,
                a[5] + row * 4,
                a[5] + (rows + 1) * 4,
            )

        return row_at

    def unpack(self, builder: Any, values: Any) -> PlaneRow:
        """See `Rows`."""
        return PlaneRow(*cgutils.unpack_tuple(builder, values))

    def codes(self, builder: Any, row: PlaneRow, index: Any, rest: Any) -> list[Any]:
        """See `Rows`."""
        if self.bits == 4:
            return _nibbles(builder, _plane(builder, row.low, index, rest, 4))
        low = _plane(builder, row.low, index, rest, 2)
        codes = [byte_field(builder, low, shift, 0x03) for shift in (0, 2, 4, 6)]
        if self.bits == 2:
            return codes
        # Four columns' high bits to a byte, as the low plane has their codes.
        high = _plane(builder, row.high, index, rest, 1)
        halves = ir.VectorType(I16, 32)
        wide = builder.zext(builder.bitcast(high, ir.VectorType(I8, 32)), halves)
        spread = builder.or_(wide, builder.shl(wide, same(halves, 4)))
        nibbles = builder.bitcast(spread, WORDS)
        return [
            builder.or_(code, byte_field(builder, nibbles, number - 2, 0x04))
            for number, code in enumerate(codes)
        ]

    def prefetch(self, builder: Any, row: PlaneRow, index: Any) -> None:
        """See `Rows`."""
        planes = row.low, row.high
        for base, width in zip(planes, PLANE_WIDTHS[self.bits], strict=False):
            place, size = _place(builder, base, index, width)
            prefetch(builder, place, size)

    def grid(self, builder: Any, row: PlaneRow, load: Load) -> tuple[Any, Any]:
        """See `Rows`."""
        scale = to_float(builder, load(row.scales, I16), self.dtype)
        width = PLANE_WIDTHS[self.bits][0]
        zero = _row_field(builder, load(row.zeros, I32), row.zero_shift, width)
        if self.bits == 3:
            words = load(row.zeros_high, I32)
            high = _row_field(builder, words, row.zero_high_shift, 1)
            zero = builder.or_(zero, builder.shl(high, same(high.type, width)))
        return scale, zero


def _place(builder: Any, base: Any, index: Any, width: int) -> tuple[Any, int]:
    """The address of a set's part of a plane, and its bytes."""
    size = _SET * width // 8
    return builder.add(base, builder.mul(index, I64(size))), size


def _plane(builder: Any, base: Any, index: Any, rest: Any, width: int) -> Any:
    """The words of one plane of a set; those after the row's end are zero."""
    place, size = _place(builder, base, index, width)
    kind = ir.VectorType(I32, size // 4)
    if rest is None:
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
        byte_field(builder, part, shift, 0x0F)
        for part, shift in ((even, 0), (even, 4), (odd, 0), (odd, 4))
    ]


def _row_field(builder: Any, words: Any, shift: Any, width: int) -> Any:
    """The bits of a row in words that hold several rows' zero-points."""
    shift = builder.trunc(shift, I32)
    if isinstance(words.type, ir.VectorType):
        shift = splat(builder, shift, words.type)
    return builder.and_(builder.lshr(words, shift), same(words.type, (1 << width) - 1))
