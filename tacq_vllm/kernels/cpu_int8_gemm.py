"""LLVM code of the product with many rows of x in 8 bits, through numba.

Weights less their zero-points are unpacked into a buffer once for a slab of tokens;
then pairs of rows are multiplied with a tile of tokens whose sums stay in registers.

Bytes of x are stored as x + 128, without sign; with the weights w, signed, the sum
Σ x·w is Σ (x + 128)·w - 128 Σ w. The last part is known when a chunk is unpacked, and
is where the integer sum begins.
"""

from typing import Any

import numba
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from tacq_vllm.kernels.cpu_chunks import ChunkReader
from tacq_vllm.kernels.cpu_dots import DOTS
from tacq_vllm.kernels.cpu_ir import (
    FLOATS,
    I8,
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
    same,
    sharer,
    sum_slots,
)
from tacq_vllm.kernels.cpu_rounding import ARGUMENTS, Rounding, rounder
from tacq_vllm.kernels.cpu_rows import Row, outlier_products

OFFSET = 128
"""What is added to bytes of x."""

TILE = 4
"""Tokens whose sums stay in registers, with those of `_PAIR` rows."""

OUT_TILE = 16
"""Tokens whose sums are added up together: as many as a vector has lanes."""

_PAIR = 2

_SLAB = 128
"""Tokens for which a row is unpacked once."""

_ROWS = 16
"""Rows that are unpacked together."""

_COLUMNS = 4096
"""Columns that are unpacked together: a tile's part of x stays in the first cache."""

_SUMS_BYTES = _SLAB * LANES * 4


def compile_gemm(reader: ChunkReader, rounding: Rounding, dot: str, team: Team) -> Any:
    """Compile out[t, r] = x[t] · W[r].

    Args:
        reader: reads the weight.
        rounding: what x becomes: with `OFFSET`, in tiles of `TILE` and `OUT_TILE`, and
            lanes like the reader's.
        dot: instructions for products of bytes: `avx512vnni`, `avx2` or `plain`.
        team: where the calling thread is.

    Returns:
        A C function void(int64 *arguments) with an `address`, to be called by every
        thread of a team; a row of the weight belongs to one thread.
    """
    share, row_at = sharer(team), reader.rows.finder()
    round_tokens = rounder(rounding, team)
    out_size = rounding.dtype.itemsize
    chunk_size, part_chunks = reader.columns, _COLUMNS // reader.columns
    row_bytes = part_chunks * _entry_bytes(reader)
    reserve_weights = reserver(_ROWS * row_bytes)
    reserve_sums = reserver(_ROWS * _SUMS_BYTES)
    head = len(ARGUMENTS)
    arguments = head + reader.rows.addresses
    unpack, multiply = _unpack(reader, dot), _multiply(reader, dot)
    finish = _finish(reader, rounding)

    @numba.cfunc(types.void(types.voidptr))
    def body(pointer):
        a = numba.carray(pointer, arguments, numba.int64)
        weight = a[head:]
        round_tokens(a)
        x, codes, scales, out = a[1], a[2], a[3], a[5]
        tokens, columns, chunks, groups, rows = a[6], a[7], a[8], a[9], a[10]
        start, stop = share(0, rows)
        weights, sums = reserve_weights(), reserve_sums()
        for slab in range(0, tokens, _SLAB):
            slab_end = min(slab + _SLAB, tokens)
            for first in range(start, stop, _ROWS):
                last = min(first + _ROWS, stop)
                for chunk in range(0, chunks, part_chunks):
                    count = min(part_chunks, chunks - chunk)
                    for row in range(first, last):
                        packed = row_at(weight, row, columns, groups, rows)
                        place = weights + (row - first) * row_bytes
                        unpack(packed, chunk, count, columns, place)
                    for token in range(slab, slab_end, TILE):
                        part = token * chunks + chunk * TILE
                        tile = codes + part * chunk_size, scales + part * LANES * 4
                        # Of an odd number of rows the last has a partner in memory.
                        for row in range(0, last - first, _PAIR):
                            multiply(
                                weights + row * row_bytes,
                                tile,
                                chunk,
                                count,
                                sums + row * _SUMS_BYTES + (token - slab) * LANES * 4,
                            )
                for row in range(first, last):
                    packed = row_at(weight, row, columns, groups, rows)
                    place = sums + (row - first) * _SUMS_BYTES
                    for token in range(slab, slab_end, OUT_TILE):
                        finish(
                            packed,
                            x + token * columns * 4,
                            place + (token - slab) * LANES * 4,
                            out + (token * rows + row) * out_size,
                            rows,
                        )

    return body


def _unpack(reader: ChunkReader, dot: str) -> Any:
    """Intrinsic: unpack `count` chunks of a row from `first` on into memory."""
    row_type = reader.rows.row_type

    @intrinsic
    def unpack(typing_context, row, first, count, columns, place):
        def codegen(context, builder, signature, arguments):
            row = reader.rows.unpack(builder, arguments[0])
            first, count, columns, place = arguments[1:]
            end = builder.add(first, count)
            whole = builder.udiv(columns, I64(reader.columns))
            rest = builder.urem(columns, I64(reader.columns))
            full = builder.select(builder.icmp_unsigned("<", end, whole), end, whole)

            def unpack_chunk(index: Any, rest: Any) -> None:
                offset = builder.mul(
                    builder.sub(index, first), I64(_entry_bytes(reader))
                )
                target = builder.add(place, offset)
                scale, start, weights = _weights(builder, reader, dot, row, index, rest)
                for number, value in enumerate((*weights, scale, start)):
                    put(builder, builder.add(target, I64(64 * number)), value)

            with cgutils.for_range_slice(builder, first, full, I64(1), I64) as (i, _):
                unpack_chunk(i, None)
            with builder.if_then(builder.icmp_unsigned(">", end, whole)):
                unpack_chunk(whole, rest)
            return context.get_dummy_value()

        number = types.int64
        return types.void(row_type, number, number, number, number), codegen

    return unpack


def _weights(
    builder: Any, reader: ChunkReader, dot: str, row: Row, index: Any, rest: Any
) -> tuple[Any, Any, list[Any]]:
    """Of a chunk: scales, where integer sums begin, and signed weights as bytes."""
    scale, zero = reader.grid(builder, row, index, rest)
    byte_zero = builder.mul(zero, same(WORDS, 0x01010101))
    bytes_type = ir.VectorType(I8, 64)
    minus = builder.bitcast(byte_zero, bytes_type)
    weights = [
        builder.bitcast(builder.sub(builder.bitcast(codes, bytes_type), minus), WORDS)
        for codes in reader.codes(builder, row, index, rest)
    ]
    total = same(WORDS, 0)
    for part in weights:
        total = DOTS[dot](builder, total, same(WORDS, OFFSET * 0x01010101), part)
    return scale, builder.neg(total), weights


def _entry_bytes(reader: ChunkReader) -> int:
    """Size of an unpacked chunk: weights, scales, and where integer sums begin."""
    return (reader.vectors + 2) * 64


def _multiply(reader: ChunkReader, dot: str) -> Any:
    """Intrinsic: add the products of a pair of rows and a tile to sums in memory."""
    entry, vectors = _entry_bytes(reader), reader.vectors
    stride = reader.rows.stride
    row_bytes = _COLUMNS // reader.columns * entry
    pairs = [(row, token) for row in range(_PAIR) for token in range(TILE)]

    @intrinsic
    def multiply(typing_context, weights, tile, first, count, sums):
        def codegen(context, builder, signature, arguments):
            weights, tile, first, count, sums = arguments
            codes, scales = cgutils.unpack_tuple(builder, tile)
            places = [
                builder.add(sums, I64(row * _SUMS_BYTES + token * LANES * 4))
                for row, token in pairs
            ]
            totals = sum_slots(builder, places, first)
            slots = [cgutils.alloca_once(builder, WORDS) for _ in pairs]
            with cgutils.for_range(builder, count, intp=I64) as loop:
                offset = builder.mul(loop.index, I64(entry))
                lines = [
                    builder.add(builder.add(weights, I64(row * row_bytes)), offset)
                    for row in range(_PAIR)
                ]
                numbers = [
                    builder.add(builder.mul(loop.index, I64(TILE)), I64(token))
                    for token in range(TILE)
                ]
                tokens = [
                    builder.add(codes, builder.mul(number, I64(reader.columns)))
                    for number in numbers
                ]
                starts = [at(builder, line, I64(vectors + 1), WORDS) for line in lines]
                for (row, _), slot in zip(pairs, slots, strict=True):
                    builder.store(starts[row], slot)
                # A loop, so that the compiler does not load everything first.
                sets = I64(vectors // stride)
                with cgutils.for_range(builder, sets, intp=I64) as part:
                    for number in range(stride):
                        index = builder.add(
                            builder.mul(part.index, I64(stride)), I64(number)
                        )
                        w = [at(builder, line, index, WORDS) for line in lines]
                        x = [at(builder, line, index, WORDS) for line in tokens]
                        for (row, token), slot in zip(pairs, slots, strict=True):
                            acc = builder.load(slot)
                            acc = DOTS[dot](builder, acc, x[token], w[row])
                            builder.store(acc, slot)
                row_scales = [at(builder, line, I64(vectors), FLOATS) for line in lines]
                x_scales = [at(builder, scales, number, FLOATS) for number in numbers]
                for (row, token), slot, total in zip(pairs, slots, totals, strict=True):
                    term = builder.sitofp(builder.load(slot), FLOATS)
                    term = builder.fmul(term, x_scales[token])
                    add_product(builder, total, row_scales[row], term)
            for place, total in zip(places, totals, strict=True):
                put(builder, place, builder.load(total))
            return context.get_dummy_value()

        number, pair = types.int64, types.UniTuple(types.int64, 2)
        return types.void(number, pair, number, number, number), codegen

    return multiply


def _finish(reader: ChunkReader, rounding: Rounding) -> Any:
    """Intrinsic: add up a row's sums and kept weights, and store the results."""
    row_type = reader.rows.row_type

    @intrinsic
    def finish(typing_context, row, x, sums, out, rows):
        def codegen(context, builder, signature, arguments):
            row = reader.rows.unpack(builder, arguments[0])
            x, sums, out, rows = arguments[1:]
            totals = [
                at(builder, sums, I64(token), FLOATS) for token in range(OUT_TILE)
            ]
            kept = outlier_products(builder, row, x, OUT_TILE, reader.rows.dtype)
            values = builder.fadd(lane_sums(builder, totals), kept)
            put_tokens(builder, out, rows, values, rounding.dtype)
            return context.get_dummy_value()

        number = types.int64
        return types.void(row_type, number, number, number, number), codegen

    return finish
