"""LLVM code of the CPU kernels that round activations to 8 bits, through numba.

x is stored in the order in which the codes of a chunk are unpacked, so that no code has
to move. Products of bytes are summed in integers over the columns of a lane, then
scaled: a lane lies inside one group, and inside one block of x.
"""

from dataclasses import dataclass, fields
from typing import Any

import numba
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from tacq_vllm.kernels.cpu_chunks import ChunkReader
from tacq_vllm.kernels.cpu_dots import DOTS
from tacq_vllm.kernels.cpu_ir import (
    F32,
    FLOATS,
    I8,
    I32,
    I64,
    LANES,
    WORDS,
    Team,
    add_product,
    at,
    lane_sum,
    multiply_add,
    put,
    row_sharer,
    same,
    splat,
    zeroed,
)
from tacq_vllm.kernels.cpu_rows import (
    ADDRESSES,
    ROW_TYPE,
    PackedRow,
    each_outlier,
    row_finder,
    unpack_row,
)

_ROWS = 16
"""Rows of the weight that pass by a part of x while that is in the first cache."""

_CACHE_BYTES = 1 << 14
"""Size of such a part."""

ARGUMENTS = (
    *ADDRESSES,
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
    kernel = _Kernel(ChunkReader(bits, dtype, group_size), tokens, dot)
    share, row_at = row_sharer(team, ARGUMENTS), row_finder(bits)
    tile_at = _tile_finder(kernel)
    reserve, add_chunks, finish = _reserve(kernel), _add_chunks(kernel), _finish(kernel)
    chunk, size, part = kernel.chunk.columns, kernel.sum_bytes, kernel.chunks_in_cache

    @numba.cfunc(types.void(types.voidptr))
    def body(pointer):
        a = numba.carray(pointer, len(ARGUMENTS), numba.int64)
        columns, groups, rows = a[12], a[14], a[15]
        whole = columns // chunk
        start, stop = share(a)
        sums = reserve()
        for first in range(start, stop, _ROWS):
            last = min(first + _ROWS, stop)
            for token in range(0, a[11], tokens):
                tile = tile_at(a, token)
                for index in range(0, whole, part):
                    end = min(index + part, whole)
                    for row in range(first, last):
                        packed = row_at(a, row, columns, groups, rows)
                        place = sums + (row - first) * size
                        add_chunks(packed, tile, index, end, place)
                for row in range(first, last):
                    packed = row_at(a, row, columns, groups, rows)
                    finish(packed, tile, whole, row, sums + (row - first) * size)

    return body


@dataclass(frozen=True)
class _Kernel:
    """What the code is specialized for."""

    chunk: ChunkReader
    tokens: int
    dot: str

    @property
    def sum_bytes(self) -> int:
        """Bytes of the sums of one row: a vector for each token."""
        return self.tokens * LANES * 4

    @property
    def chunks_in_cache(self) -> int:
        """Chunks of x, with scales and sums, that stay in the first cache."""
        size = self.tokens * (self.chunk.columns + 2 * LANES * 4)
        return max(1, _CACHE_BYTES // size)


@dataclass(frozen=True)
class _Tile:
    """LLVM values that describe a tile of x and of the output."""

    x: Any
    codes: Any
    scales: Any
    sums: Any
    out: Any
    columns: Any
    chunks: Any
    rows: Any


_TILE_TYPE = types.UniTuple(types.int64, len(fields(_Tile)))


def _tile_finder(kernel: _Kernel) -> Any:
    chunk = kernel.chunk.columns

    @numba.njit(inline="always")
    def tile_at(a, token):
        """What describes the tile from a token on, in the order of `_Tile`."""
        columns, chunks, rows = a[12], a[13], a[15]
        lanes = token * chunks * LANES * 4
        return (
            a[6] + token * columns * 4,
            a[7] + token * chunks * chunk,
            a[8] + lanes,
            a[9] + lanes,
            a[10] + token * rows * 4,
            columns,
            chunks,
            rows,
        )

    return tile_at


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
    def add_chunks(typing_context, row, tile, first, last, sums):
        def codegen(context, builder, signature, arguments):
            row = unpack_row(builder, arguments[0])
            tile = _Tile(*cgutils.unpack_tuple(builder, arguments[1]))
            first, last, sums = arguments[2:]
            slots = _load_sums(builder, kernel, sums, first)
            with cgutils.for_range_slice(builder, first, last, I64(1), I64) as (i, _):
                _add_chunk(builder, kernel, row, tile, i, None, slots)
            for token, slot in enumerate(slots):
                place = builder.add(sums, I64(token * LANES * 4))
                put(builder, place, builder.load(slot))
            return context.get_dummy_value()

        number = types.int64
        return types.void(ROW_TYPE, _TILE_TYPE, number, number, number), codegen

    return add_chunks


def _finish(kernel: _Kernel) -> Any:
    """Intrinsic: add the last columns and the kept weights, and store the results."""

    @intrinsic
    def finish(typing_context, row, tile, whole, number, sums):
        def codegen(context, builder, signature, arguments):
            row = unpack_row(builder, arguments[0])
            tile = _Tile(*cgutils.unpack_tuple(builder, arguments[1]))
            whole, number, sums = arguments[2:]
            slots = _load_sums(builder, kernel, sums, whole)
            rest = builder.urem(tile.columns, I64(kernel.chunk.columns))
            with builder.if_then(builder.icmp_unsigned("!=", rest, I64(0))):
                _add_chunk(builder, kernel, row, tile, whole, rest, slots)
            kept = _outlier_products(builder, kernel, row, tile)
            for token, slot in enumerate(slots):
                total = lane_sum(builder, builder.load(slot))
                value = builder.fadd(total, builder.extract_element(kept, I32(token)))
                line = builder.mul(tile.rows, I64(token))
                place = builder.mul(builder.add(line, number), I64(4))
                put(builder, builder.add(tile.out, place), value)
            return context.get_dummy_value()

        number = types.int64
        return types.void(ROW_TYPE, _TILE_TYPE, number, number, number), codegen

    return finish


def _load_sums(builder: Any, kernel: _Kernel, sums: Any, chunks: Any) -> list[Any]:
    """The sums of a row, in registers; they are zero where no chunks came before."""
    slots = [zeroed(builder) for _ in range(kernel.tokens)]
    with builder.if_then(builder.icmp_unsigned("!=", chunks, I64(0))):
        for token, slot in enumerate(slots):
            builder.store(at(builder, sums, I64(token), FLOATS), slot)
    return slots


def _outlier_products(
    builder: Any, kernel: _Kernel, row: PackedRow, tile: _Tile
) -> Any:
    """A row's kept weights times the tokens of the tile."""
    kind = ir.VectorType(F32, kernel.tokens)
    slot = cgutils.alloca_once(builder, kind)
    builder.store(same(kind, 0), slot)
    with each_outlier(builder, row, kernel.chunk.dtype) as (column, value):
        x = at(builder, tile.x, column, kind)
        add_product(builder, slot, splat(builder, value, kind), x)
    return builder.load(slot)


def _add_chunk(
    builder: Any,
    kernel: _Kernel,
    row: PackedRow,
    tile: _Tile,
    index: Any,
    rest: Any,
    totals: list[Any],
) -> None:
    """Add a chunk's products to the totals; of the last, `rest` columns exist."""
    codes = kernel.chunk.codes(builder, row, index, rest)
    scale, zero = kernel.chunk.grid(builder, row, index, rest)
    minus_zero = builder.fneg(zero)
    for token, total in enumerate(totals):
        number = builder.add(builder.mul(tile.chunks, I64(token)), index)
        line = builder.mul(number, I64(kernel.chunk.columns))
        place = builder.add(tile.codes, line)
        acc = same(WORDS, 0)
        for part, weights in enumerate(codes):
            x = at(builder, place, I64(part), WORDS)
            acc = DOTS[kernel.dot](builder, acc, weights, x)
        x_scale = at(builder, tile.scales, number, FLOATS)
        x_sum = at(builder, tile.sums, number, FLOATS)
        product = builder.fmul(builder.sitofp(acc, FLOATS), x_scale)
        term = multiply_add(builder, minus_zero, x_sum, product)
        add_product(builder, total, scale, term)
