"""LLVM code of the product with few rows of x in 8 bits, through numba.

x is stored in the order in which the codes of a chunk are unpacked, so that no code has
to move. Products of bytes are summed in integers over the columns of a lane, then
scaled: a lane lies inside one group, and inside one block of x.
"""

from typing import Any

import numba
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from tacq_vllm.kernels.cpu_chunks import ChunkReader
from tacq_vllm.kernels.cpu_dots import DOTS
from tacq_vllm.kernels.cpu_ir import (
    FLOATS,
    I64,
    LANES,
    WORDS,
    Team,
    add_product,
    at,
    lane_sums,
    put,
    put_tokens,
    reserver,
    sharer,
    sum_slots,
)
from tacq_vllm.kernels.cpu_rounding import ARGUMENTS
from tacq_vllm.kernels.cpu_rows import Row, outlier_products
from tacq_vllm.kernels.cpu_token_lanes import TokenLanes, lanes_rounder

_ROWS = 16
"""Rows of the weight that pass by a part of x while that is in the first cache."""

_CHUNKS = 64
"""Chunks of such a part, divided by the number of tokens."""


def compile_gemv(reader: ChunkReader, lanes: TokenLanes, dot: str, team: Team) -> Any:
    """Compile out[t, r] = x[t] · W[r] for at most one tile of rows of x.

    Args:
        reader: reads the weight.
        lanes: what x becomes.
        dot: instructions for products of bytes: `avx512vnni`, `avx2` or `plain`.
        team: where the calling thread is.

    Returns:
        A C function void(int64 *arguments) with an `address`, to be called by every
        thread of a team; a row of the weight belongs to one thread.
    """
    share, row_at = sharer(team), reader.rows.finder()
    round_tokens = lanes_rounder(lanes, team)
    tokens = lanes.tile
    size, width, part = tokens * LANES * 4, reader.columns, _CHUNKS // tokens
    out_size = lanes.dtype.itemsize
    reserve = reserver(_ROWS * size)
    head = len(ARGUMENTS)
    arguments = head + reader.rows.addresses
    add_chunks = _add_chunks(reader, tokens, dot)
    finish = _finish(reader, lanes, dot)

    @numba.cfunc(types.void(types.voidptr))
    def body(pointer):
        a = numba.carray(pointer, arguments, numba.int64)
        weight = a[head:]
        round_tokens(a)
        x, out, columns, groups, rows = a[1], a[5], a[7], a[8], a[9]
        whole = columns // width
        tile = a[2], a[3], a[4]
        start, stop = share(0, rows)
        sums = reserve()
        for first in range(start, stop, _ROWS):
            last = min(first + _ROWS, stop)
            for chunk in range(0, whole, part):
                end = min(chunk + part, whole)
                for row in range(first, last):
                    packed = row_at(weight, row, columns, groups, rows)
                    add_chunks(packed, tile, chunk, end, sums + (row - first) * size)
            for row in range(first, last):
                packed = row_at(weight, row, columns, groups, rows)
                target = x, columns, out + row * out_size, rows
                finish(packed, tile, whole, sums + (row - first) * size, target)

    return body


_TILE_TYPE = types.UniTuple(types.int64, 3)
"""Addresses of the codes of x, of scales and of sums of codes."""


def _add_chunks(reader: ChunkReader, tokens: int, dot: str) -> Any:
    """Intrinsic: add the products of a row's whole chunks to its sums in memory."""
    row_type = reader.rows.row_type

    @intrinsic
    def add_chunks(typing_context, row, tile, first, last, sums):
        def codegen(context, builder, signature, arguments):
            row = reader.rows.unpack(builder, arguments[0])
            tile = cgutils.unpack_tuple(builder, arguments[1])
            first, last, sums = arguments[2:]
            places = _places(builder, sums, tokens)
            slots = sum_slots(builder, places, first)
            with cgutils.for_range_slice(builder, first, last, I64(1), I64) as (i, _):
                _add_chunk(builder, reader, dot, row, tile, i, None, slots)
            for place, slot in zip(places, slots, strict=True):
                put(builder, place, builder.load(slot))
            return context.get_dummy_value()

        number = types.int64
        return types.void(row_type, _TILE_TYPE, number, number, number), codegen

    return add_chunks


def _finish(reader: ChunkReader, lanes: TokenLanes, dot: str) -> Any:
    """Intrinsic: add the last columns and the kept weights, and store the results."""
    tokens, row_type = lanes.tile, reader.rows.row_type

    @intrinsic
    def finish(typing_context, row, tile, whole, sums, target):
        def codegen(context, builder, signature, arguments):
            row = reader.rows.unpack(builder, arguments[0])
            tile = cgutils.unpack_tuple(builder, arguments[1])
            whole, sums = arguments[2:4]
            x, columns, out, rows = cgutils.unpack_tuple(builder, arguments[4])
            slots = sum_slots(builder, _places(builder, sums, tokens), whole)
            rest = builder.urem(columns, I64(reader.columns))
            with builder.if_then(builder.icmp_unsigned("!=", rest, I64(0))):
                _add_chunk(builder, reader, dot, row, tile, whole, rest, slots)
            totals = lane_sums(builder, [builder.load(slot) for slot in slots])
            kept = outlier_products(
                builder, row, reader.rows.dtype, x, tokens, lanes.dtype
            )
            values = builder.fadd(totals, kept)
            put_tokens(builder, out, rows, values, lanes.dtype)
            return context.get_dummy_value()

        number, target = types.int64, types.UniTuple(types.int64, 4)
        return types.void(row_type, _TILE_TYPE, number, number, target), codegen

    return finish


def _places(builder: Any, sums: Any, tokens: int) -> list[Any]:
    """Where the sums of one row and each token lie."""
    return [builder.add(sums, I64(token * LANES * 4)) for token in range(tokens)]


def _add_chunk(
    builder: Any,
    reader: ChunkReader,
    dot: str,
    row: Row,
    tile: list[Any],
    index: Any,
    rest: Any,
    totals: list[Any],
) -> None:
    """Add a chunk's products to the totals; of the last, `rest` columns exist."""
    codes = reader.codes(builder, row, index, rest)
    scale, zero = reader.grid(builder, row, index, rest)
    minus_zero = builder.neg(zero)
    x_codes, x_scales, x_sums = tile
    for token, total in enumerate(totals):
        part = builder.add(builder.mul(index, I64(len(totals))), I64(token))
        place = builder.add(x_codes, builder.mul(part, I64(reader.columns)))
        # Of Σ x·(code - zero) the second part.
        acc = builder.mul(minus_zero, at(builder, x_sums, part, WORDS))
        for number, weights in enumerate(codes):
            x = at(builder, place, I64(number), WORDS)
            acc = DOTS[dot](builder, acc, weights, x)
        x_scale = at(builder, x_scales, part, FLOATS)
        term = builder.fmul(builder.sitofp(acc, FLOATS), x_scale)
        add_product(builder, total, scale, term)
