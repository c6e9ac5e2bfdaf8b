"""LLVM code for the products of a row's kept weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from llvmlite import ir
from numba.core import cgutils

from tacq_vllm.kernels.cpu_ir import (
    F32,
    FLOATS,
    I16,
    I32,
    I64,
    LANES,
    WORDS,
    add_product,
    at,
    call,
    lanes_below,
    load_some,
    same,
    splat,
    stored_type,
    to_float,
)
from tacq_vllm.kernels.cpu_rows import Row

_HALVES = ir.VectorType(I16, LANES)
_NUMBERS = ir.VectorType(I64, LANES)


@contextmanager
def each_kept(builder: Any, row: Row, dtype: torch.dtype) -> Iterator[tuple[Any, Any]]:
    """Loop over a row's kept weights: the column and the value, as float."""
    with cgutils.for_range_slice(builder, *_bounds(builder, row), I64(1), I64) as (
        index,
        _,
    ):
        entry = at(builder, row.entries, index, I32)
        column = builder.zext(builder.and_(entry, I32(0xFFFF)), I64)
        stored = builder.trunc(builder.lshr(entry, I32(16)), I16)
        yield column, to_float(builder, stored, dtype)


def kept_products(
    builder: Any,
    row: Row,
    dtype: torch.dtype,
    x: Any,
    tokens: int,
    x_dtype: torch.dtype,
) -> Any:
    """A row's kept weights times x [in, tokens] at an address: a vector of floats."""
    stored = ir.VectorType(stored_type(x_dtype), tokens)
    kind = ir.VectorType(F32, tokens)
    slot = cgutils.alloca_once(builder, kind)
    builder.store(same(kind, 0), slot)
    with each_kept(builder, row, dtype) as (column, value):
        values = to_float(builder, at(builder, x, column, stored), x_dtype)
        add_product(builder, slot, splat(builder, value, kind), values)
    return builder.load(slot)


def add_kept(
    builder: Any,
    row: Row,
    dtype: torch.dtype,
    lines: list[Any],
    x_dtype: torch.dtype,
    totals: list[Any],
) -> None:
    """Add a row's kept weights times rows of x to sums, in as many lanes as there are.

    Args:
        builder: what appends instructions.
        row: the row.
        dtype: of kept weights.
        lines: addresses of rows of x, which have an even number of columns.
        x_dtype: the type of x.
        totals: slots of vectors of sums, one for each row of x.
    """
    first, last = _bounds(builder, row)
    with cgutils.for_range_slice(builder, first, last, I64(LANES), I64) as (index, _):
        left = builder.sub(last, index)
        place = builder.add(row.entries, builder.mul(index, I64(4)))
        # Those that do not exist are 0, of column 0.
        entries = load_some(builder, place, WORDS, left)
        columns = builder.and_(entries, same(WORDS, 0xFFFF))
        stored = builder.trunc(builder.lshr(entries, same(WORDS, 16)), _HALVES)
        values = to_float(builder, stored, dtype)
        exists = lanes_below(builder, left, LANES)
        for line, total in zip(lines, totals, strict=True):
            x = _gather(builder, line, columns, x_dtype)
            x = builder.select(exists, x, same(FLOATS, 0))
            add_product(builder, total, values, x)


def _bounds(builder: Any, row: Row) -> tuple[Any, Any]:
    """Numbers of a row's first kept weight, and of the next row's."""
    first, last = (
        builder.zext(at(builder, row.offsets, I64(number), I32), I64)
        for number in (0, 1)
    )
    return first, last


def _gather(builder: Any, line: Any, columns: Any, dtype: torch.dtype) -> Any:
    """Elements of a row of x at an address, as floats."""
    if dtype == torch.float32:
        return builder.bitcast(_gather_words(builder, line, columns), FLOATS)
    # A word has two of 16 bits.
    words = _gather_words(builder, line, builder.lshr(columns, same(WORDS, 1)))
    odd = builder.and_(columns, same(WORDS, 1))
    shifted = builder.lshr(words, builder.shl(odd, same(WORDS, 4)))
    return to_float(builder, builder.trunc(shifted, _HALVES), dtype)


def _gather_words(builder: Any, base: Any, indices: Any) -> Any:
    """Words at an address."""
    offsets = builder.shl(builder.zext(indices, _NUMBERS), same(_NUMBERS, 2))
    places = builder.add(splat(builder, base, _NUMBERS), offsets)
    pointers = builder.inttoptr(places, ir.VectorType(I32.as_pointer(), LANES))
    everywhere = same(ir.VectorType(ir.IntType(1), LANES), 1)
    name = f"llvm.masked.gather.v{LANES}i32.v{LANES}p0"
    return call(builder, name, WORDS, [pointers, I32(1), everywhere, same(WORDS, 0)])
