"""LLVM code that reads a packed row: where it lies, its grid, its kept weights."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import numba
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils

from tacq_vllm.format.linear import PackedLinear
from tacq_vllm.format.packing import PLANE_WIDTHS
from tacq_vllm.kernels.cpu_ir import (
    F32,
    I16,
    I32,
    I64,
    add_product,
    at,
    same,
    splat,
    to_float,
)

ADDRESSES = (
    "qweight",
    "qweight_high",
    "scales",
    "qzeros",
    "qzeros_high",
    "outliers",
)
"""The first arguments of every kernel: the addresses of a packed weight's tensors."""


def weight_addresses(packed: PackedLinear) -> tuple[int, ...]:
    """Where the packed tensors lie, in the order in which kernels take them."""
    high, zeros_high = packed.qweight_high, packed.qzeros_high
    return (
        packed.qweight.data_ptr(),
        0 if high is None else high.data_ptr(),
        packed.scales.data_ptr(),
        packed.qzeros.data_ptr(),
        0 if zeros_high is None else zeros_high.data_ptr(),
        packed.outliers.data_ptr(),
    )


@dataclass(frozen=True)
class PackedRow:
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


ROW_TYPE = types.UniTuple(types.int64, len(fields(PackedRow)))


def row_finder(bits: int) -> Any:
    """Compile what finds a row by its number, for `PackedRow`.

    It takes the kernel's arguments, the row, and the numbers of columns, groups and
    rows of the weight.
    """
    width = PLANE_WIDTHS[bits][0]

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


def unpack_row(builder: Any, values: Any) -> PackedRow:
    """The row that an intrinsic was given."""
    return PackedRow(*cgutils.unpack_tuple(builder, values))


def load_grid(
    builder: Any,
    row: PackedRow,
    bits: int,
    dtype: torch.dtype,
    load: Callable[[Any, Any], Any],
) -> tuple[Any, Any]:
    """The scale, as float, and the zero-point, as integer, of one or more groups.

    `load` reads those groups' elements of a type from an array at an address.
    """
    scale = to_float(builder, load(row.scales, I16), dtype)
    width = PLANE_WIDTHS[bits][0]
    zero = _field(builder, load(row.zeros, I32), row.zero_shift, width)
    if bits == 3:
        high = _field(builder, load(row.zeros_high, I32), row.zero_high_shift, 1)
        zero = builder.or_(zero, builder.shl(high, same(high.type, width)))
    return scale, zero


@contextmanager
def each_outlier(
    builder: Any, row: PackedRow, dtype: torch.dtype
) -> Iterator[tuple[Any, Any]]:
    """Loop over a row's kept weights: the column and the value, as float."""
    first, last = (
        builder.zext(at(builder, row.offsets, I64(number), I32), I64)
        for number in (0, 1)
    )
    with cgutils.for_range_slice(builder, first, last, I64(1), I64) as (index, _):
        entry = at(builder, row.entries, index, I32)
        column = builder.zext(builder.and_(entry, I32(0xFFFF)), I64)
        stored = builder.trunc(builder.lshr(entry, I32(16)), I16)
        yield column, to_float(builder, stored, dtype)


def outlier_products(
    builder: Any, row: PackedRow, x: Any, tokens: int, dtype: torch.dtype
) -> Any:
    """A row's kept weights times x, float32 [in, tokens] at an address: a vector."""
    kind = ir.VectorType(F32, tokens)
    slot = cgutils.alloca_once(builder, kind)
    builder.store(same(kind, 0), slot)
    with each_outlier(builder, row, dtype) as (column, value):
        values = at(builder, x, column, kind)
        add_product(builder, slot, splat(builder, value, kind), values)
    return builder.load(slot)


def _field(builder: Any, words: Any, shift: Any, width: int) -> Any:
    """The bits of a row in words that hold several rows' zero-points."""
    shift = builder.trunc(shift, I32)
    if isinstance(words.type, ir.VectorType):
        shift = splat(builder, shift, words.type)
    return builder.and_(builder.lshr(words, shift), same(words.type, (1 << width) - 1))
