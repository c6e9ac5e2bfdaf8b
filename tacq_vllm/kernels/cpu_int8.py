"""LLVM code of the CPU kernels that round activations to 8 bits, through numba.

64 bytes of a row's low plane hold the codes of a chunk of columns. Shifted and masked
where they are, they make vectors of 64 codes, one of every fourth column (4 bits: of
every second); x is stored in that order, so that no code has to move. Products of bytes
are summed in integers over the columns of a lane, then scaled: a lane lies inside one
group, and inside one block of x.
"""

from dataclasses import dataclass, fields
from typing import Any

import numba
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from tacq_vllm.kernels.cpu_dots import DOTS
from tacq_vllm.kernels.cpu_ir import (
    F32,
    FLOATS,
    I8,
    I16,
    I32,
    I64,
    LANES,
    WORDS,
    Team,
    add_product,
    at,
    lane_sum,
    load_some,
    multiply_add,
    pick,
    put,
    row_sharer,
    same,
    splat,
    to_float,
    zeroed,
)
from tacq_vllm.kernels.cpu_rounding import chunk_columns

_ROWS = 16
"""Rows of the weight that pass by a part of x while that is in the first cache."""

_CACHE_BYTES = 1 << 14
"""Size of such a part."""

ARGUMENTS = (
    "qweight",
    "qweight_high",
    "weight_scales",
    "qzeros",
    "qzeros_high",
    "outliers",
    "x_tiles",
    "codes",
    "scales",
    "sums",
    "out",
    "tokens",
    "columns",
    "chunks",
    "groups",
    "out_features",
    "first_row",
    "last_row",
)
"""What the product is given: addresses of tensors, then sizes, as 64-bit integers.

`x_tiles` is x itself, float32 [tiles, in, tokens of a tile].
"""


def supports_groups(bits: int, group_size: int, in_features: int) -> bool:
    """Whether a group and a chunk divide one another, or a row is one group."""
    chunk = chunk_columns(bits)
    whole = group_size == in_features
    return whole or chunk % group_size == 0 or group_size % chunk == 0


def compile_linear(
    bits: int, dtype: torch.dtype, group_size: int, tokens: int, dot: str, team: Team
) -> Any:
    """Compile out[t, r] = x[t] · W[r], `tokens` rows of x at a time.

    Args:
        bits: bits of a code.
        dtype: 16-bit type of scales and kept weights.
        group_size: columns of a group; 0: the whole row.
        tokens: what divides the number of rows of x.
        dot: instructions for products of bytes: `vnni`, `avx2` or `plain`.
        team: where the calling thread is.

    Returns:
        A C function void(int64 *arguments) with an `address`, to be called by every
        thread of a team; a row of the weight belongs to one thread.
    """
    kernel = _Kernel(bits, dtype, group_size, tokens, dot)
    share, row_at = row_sharer(team, ARGUMENTS), _row_finder(kernel)
    reserve, add_chunks, finish = _reserve(kernel), _add_chunks(kernel), _finish(kernel)
    chunk, size, part = kernel.chunk, kernel.sum_bytes, kernel.chunks_in_cache

    @numba.cfunc(types.void(types.voidptr))
    def body(pointer):
        a = numba.carray(pointer, len(ARGUMENTS), numba.int64)
        whole = a[12] // chunk
        start, stop = share(a)
        sums = reserve()
        for first in range(start, stop, _ROWS):
            last = min(first + _ROWS, stop)
            for tile in range(0, a[11], tokens):
                for index in range(0, whole, part):
                    end = min(index + part, whole)
                    for row in range(first, last):
                        place = sums + (row - first) * size
                        add_chunks(row_at(a, row, tile), index, end, place)
                for row in range(first, last):
                    finish(row_at(a, row, tile), whole, sums + (row - first) * size)

    return body


@dataclass(frozen=True)
class _Kernel:
    """What a row's code is specialized for."""

    bits: int
    dtype: torch.dtype
    group_size: int
    tokens: int
    dot: str

    @property
    def chunk(self) -> int:
        """Columns of a chunk."""
        return chunk_columns(self.bits)

    @property
    def groups(self) -> int:
        """Groups of a chunk; 0: a group is a chunk or more."""
        if self.group_size == 0 or self.group_size >= self.chunk:
            return 0
        return self.chunk // self.group_size

    @property
    def sum_bytes(self) -> int:
        """Bytes of the sums of one row: a vector for each token."""
        return self.tokens * LANES * 4

    @property
    def chunks_in_cache(self) -> int:
        """Chunks of x, with scales and sums, that stay in the first cache."""
        return max(1, _CACHE_BYTES // (self.tokens * (self.chunk + 2 * LANES * 4)))


@dataclass(frozen=True)
class _Row:
    """LLVM values that describe one packed row, a tile of x and the output."""

    low: Any
    high: Any
    scales: Any
    zeros: Any
    zero_shift: Any
    zeros_high: Any
    zero_high_shift: Any
    outliers: Any
    entries: Any
    x: Any
    codes: Any
    code_scales: Any
    code_sums: Any
    out: Any
    columns: Any
    chunks: Any
    rows: Any


_ROW_TYPE = types.UniTuple(types.int64, len(fields(_Row)))


def _row_finder(kernel: _Kernel) -> Any:
    chunk, width = kernel.chunk, 4 if kernel.bits == 4 else 2

    @numba.njit(inline="always")
    def row_at(a, row, tile):
        """What describes a row and a tile, in the order of `_Row`."""
        columns, chunks, groups, rows = a[12], a[13], a[14], a[15]
        lanes = tile * chunks * LANES * 4
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
            a[6] + tile * columns * 4,
            a[7] + tile * chunks * chunk,
            a[8] + lanes,
            a[9] + lanes,
            a[10] + (tile * rows + row) * 4,
            columns,
            chunks,
            rows,
        )

    return row_at


def _reserve(kernel: _Kernel) -> Any:
    """Intrinsic: the address of memory on the stack for the sums of `_ROWS` rows."""
    size = _ROWS * kernel.sum_bytes

    @intrinsic
    def reserve(typing_context):
        def codegen(context, builder, signature, arguments):
            memory = cgutils.alloca_once(builder, ir.ArrayType(I8, size))
            return builder.ptrtoint(memory, I64)

        return types.int64(), codegen

    return reserve


def _add_chunks(kernel: _Kernel) -> Any:
    """Intrinsic: add the products of a row's whole chunks to its sums in memory."""

    @intrinsic
    def add_chunks(typing_context, row, first, last, sums):
        def codegen(context, builder, signature, arguments):
            values, first, last, sums = arguments
            row = _Row(*cgutils.unpack_tuple(builder, values))
            slots = _load_sums(builder, kernel, sums)
            with builder.if_then(builder.icmp_unsigned("==", first, I64(0))):
                for slot in slots:
                    builder.store(same(FLOATS, 0), slot)
            with cgutils.for_range_slice(builder, first, last, I64(1), I64) as (i, _):
                _add_chunk(builder, kernel, row, i, None, slots)
            for token, slot in enumerate(slots):
                place = builder.add(sums, I64(token * LANES * 4))
                put(builder, place, builder.load(slot))
            return context.get_dummy_value()

        number = types.int64
        return types.void(_ROW_TYPE, number, number, number), codegen

    return add_chunks


def _finish(kernel: _Kernel) -> Any:
    """Intrinsic: add the last columns and the kept weights, and store the results."""

    @intrinsic
    def finish(typing_context, row, whole, sums):
        def codegen(context, builder, signature, arguments):
            values, whole, sums = arguments
            row = _Row(*cgutils.unpack_tuple(builder, values))
            slots = _load_sums(builder, kernel, sums)
            with builder.if_then(builder.icmp_unsigned("==", whole, I64(0))):
                for slot in slots:
                    builder.store(same(FLOATS, 0), slot)
            rest = builder.urem(row.columns, I64(kernel.chunk))
            with builder.if_then(builder.icmp_unsigned("!=", rest, I64(0))):
                _add_chunk(builder, kernel, row, whole, rest, slots)
            kept = _outlier_products(builder, kernel, row)
            for token, slot in enumerate(slots):
                total = lane_sum(builder, builder.load(slot))
                value = builder.fadd(total, builder.extract_element(kept, I32(token)))
                offset = builder.mul(row.rows, I64(4 * token))
                put(builder, builder.add(row.out, offset), value)
            return context.get_dummy_value()

        return types.void(_ROW_TYPE, types.int64, types.int64), codegen

    return finish


def _load_sums(builder: Any, kernel: _Kernel, sums: Any) -> list[Any]:
    """The sums of a row, which the compiler keeps in registers."""
    slots = [zeroed(builder) for _ in range(kernel.tokens)]
    for token, slot in enumerate(slots):
        builder.store(at(builder, sums, I64(token), FLOATS), slot)
    return slots


def _outlier_products(builder: Any, kernel: _Kernel, row: _Row) -> Any:
    """A row's kept weights times the tokens of the tile."""
    kind = ir.VectorType(F32, kernel.tokens)
    slot = cgutils.alloca_once(builder, kind)
    builder.store(same(kind, 0), slot)
    first, last = (
        builder.zext(at(builder, row.outliers, I64(number), I32), I64)
        for number in (0, 1)
    )
    with cgutils.for_range_slice(builder, first, last, I64(1), I64) as (index, _):
        entry = at(builder, row.entries, index, I32)
        column = builder.zext(builder.and_(entry, I32(0xFFFF)), I64)
        stored = builder.trunc(builder.lshr(entry, I32(16)), I16)
        value = splat(builder, to_float(builder, stored, kernel.dtype), kind)
        x = at(builder, row.x, column, kind)
        builder.store(multiply_add(builder, value, x, builder.load(slot)), slot)
    return builder.load(slot)


def _add_chunk(
    builder: Any, kernel: _Kernel, row: _Row, index: Any, rest: Any, totals: list[Any]
) -> None:
    """Add a chunk's products to the totals; of the last, `rest` columns exist."""
    codes = _codes(builder, kernel.bits, row, index, rest)
    scale, zero = _grid(builder, kernel, row, index, rest)
    minus_zero = builder.fneg(zero)
    lanes = builder.mul(index, I64(LANES * 4))
    first = builder.mul(index, I64(kernel.chunk))
    for token, total in enumerate(totals):
        tokens = builder.mul(row.chunks, I64(token))
        line = builder.mul(tokens, I64(kernel.chunk))
        place = builder.add(row.codes, builder.add(line, first))
        acc = ir.Constant(WORDS, [0] * LANES)
        for number, weights in enumerate(codes):
            x = at(builder, place, I64(number), WORDS)
            acc = DOTS[kernel.dot](builder, acc, weights, x)
        line = builder.add(lanes, builder.mul(tokens, I64(LANES * 4)))
        x_scale = at(builder, builder.add(row.code_scales, line), I64(0), FLOATS)
        x_sum = at(builder, builder.add(row.code_sums, line), I64(0), FLOATS)
        product = builder.fmul(builder.sitofp(acc, FLOATS), x_scale)
        term = multiply_add(builder, minus_zero, x_sum, product)
        add_product(builder, total, scale, term)


def _codes(builder: Any, bits: int, row: _Row, index: Any, rest: Any) -> list[Any]:
    """The codes of a chunk, one per byte: four vectors of 64, of 4 bits two."""
    width = 4 if bits == 4 else 2
    low = _plane(builder, row.low, index, rest, LANES, width)
    mask = _constant(0x0F0F0F0F if bits == 4 else 0x03030303)
    codes = [
        builder.and_(builder.lshr(low, _constant(shift)) if shift else low, mask)
        for shift in range(0, 8, width)
    ]
    if bits != 3:
        return codes
    # Four columns' high bits to a byte, as the low plane has their codes.
    high = _plane(builder, row.high, index, rest, LANES // 2, 1)
    halves = ir.VectorType(I16, 32)
    bits_16 = builder.zext(builder.bitcast(high, ir.VectorType(I8, 32)), halves)
    spread = builder.or_(bits_16, builder.shl(bits_16, ir.Constant(halves, [4] * 32)))
    nibbles = builder.bitcast(spread, WORDS)
    four = _constant(0x04040404)
    shifted = [
        builder.shl(nibbles, _constant(2)),
        builder.shl(nibbles, _constant(1)),
        nibbles,
        builder.lshr(nibbles, _constant(1)),
    ]
    return [
        builder.or_(code, builder.and_(bit, four))
        for code, bit in zip(codes, shifted, strict=True)
    ]


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


def _grid(
    builder: Any, kernel: _Kernel, row: _Row, index: Any, rest: Any
) -> tuple[Any, Any]:
    """Scale and zero-point of every lane of a chunk."""
    count = kernel.groups
    width = 4 if kernel.bits == 4 else 2
    if count == 0:
        group = I64(0)
        if kernel.group_size:
            chunks = kernel.group_size // kernel.chunk
            group = builder.udiv(index, I64(chunks))
        scale = to_float(builder, at(builder, row.scales, group, I16), kernel.dtype)

        def word(base: Any) -> Any:
            return at(builder, base, group, I32)

        lanes = [0] * LANES
    else:
        first = builder.mul(index, I64(count))
        valid = None
        if rest is not None:
            valid = builder.udiv(rest, I64(kernel.group_size))
        stored = _some(builder, row.scales, first, ir.VectorType(I16, count), valid)
        scale = to_float(builder, stored, kernel.dtype)

        def word(base: Any) -> Any:
            return _some(builder, base, first, ir.VectorType(I32, count), valid)

        lanes = [lane * count // LANES for lane in range(LANES)]
    zero = _field(builder, word(row.zeros), row.zero_shift, (1 << width) - 1)
    if kernel.bits == 3:
        top = _field(builder, word(row.zeros_high), row.zero_high_shift, 1)
        zero = builder.or_(zero, builder.shl(top, same(top.type, 2)))
    floats = builder.uitofp(zero, scale.type)
    return tuple(_to_lanes(builder, value, lanes) for value in (scale, floats))


def _some(builder: Any, base: Any, first: Any, kind: Any, valid: Any) -> Any:
    """Elements from `first` on; those after the row's end are zero."""
    size = 2 if kind.element is I16 else 4
    place = builder.add(base, builder.mul(first, I64(size)))
    if valid is None:
        return at(builder, place, I64(0), kind)
    return load_some(builder, place, kind, valid)


def _field(builder: Any, words: Any, shift: Any, mask: int) -> Any:
    """A zero-point (3 bits: its low or high part) in words."""
    shift = builder.trunc(shift, I32)
    if isinstance(words.type, ir.VectorType):
        shift = splat(builder, shift, words.type)
    return builder.and_(builder.lshr(words, shift), same(words.type, mask))


def _to_lanes(builder: Any, value: Any, lanes: list[int]) -> Any:
    """Spread a scalar, or the elements of a vector, over the lanes."""
    if not isinstance(value.type, ir.VectorType):
        return splat(builder, value, FLOATS)
    return pick(builder, value, lanes)


def _constant(number: int) -> Any:
    return same(WORDS, number)
