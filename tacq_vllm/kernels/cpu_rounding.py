"""LLVM code that rounds activations to 8 bits, for the kernels that multiply bytes."""

from typing import Any

import numba
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from tacq_vllm.kernels.cpu_ir import (
    F32,
    I8,
    I32,
    I64,
    LANES,
    Team,
    at,
    call,
    pick,
    put,
    row_sharer,
    same,
    splat,
)


def block_columns(span: int) -> int:
    """Columns of x that share a scale, where lanes may have up to `span` columns."""
    return max(32, span)


ARGUMENTS = (
    "x",
    "codes",
    "scales",
    "sums",
    "columns",
    "chunks",
    "tile",
    "first_row",
    "last_row",
)
"""What the rounding kernel is given; its rows are the tokens."""


def compile_rounding(offset: int, span: int, block: int, team: Team) -> Any:
    """Compile the rounding of x to 8 bits, in the order in which codes are unpacked.

    Per token and block of columns: scale = max|x| / 127, code = round(x / scale).
    Stored are code + `offset`; for each lane, of `span` columns, the scale; and, if the
    offset is 0, the sum of its codes. They lie in [tiles, chunks, tokens of a tile, …].
    """
    share = row_sharer(team, ARGUMENTS)
    round_block = _round_block(offset, span, block)
    chunk_size = LANES * span

    @numba.cfunc(types.void(types.voidptr))
    def body(pointer):
        a = numba.carray(pointer, len(ARGUMENTS), numba.int64)
        x, codes, scales, sums = a[0], a[1], a[2], a[3]
        columns, chunks, tile = a[4], a[5], a[6]
        start, stop = share(a)
        for token in range(start, stop):
            for column in range(0, columns, block):
                chunk = token // tile * chunks + column // chunk_size
                part, lane = chunk * tile + token % tile, column % chunk_size // span
                place = (part * LANES + lane) * 4
                round_block(
                    x + (token * columns + column) * 4,
                    codes + part * chunk_size + lane * 4,
                    scales + place,
                    sums + place,
                )

    return body


def _round_block(offset: int, span: int, block: int) -> Any:
    """Intrinsic: one block of x to bytes, with the scale and sum of each lane."""
    floats, words = ir.VectorType(F32, block), ir.VectorType(I32, block)
    lanes = range(0, block, span)

    def call_float(builder: Any, name: str, value: Any) -> Any:
        return call(builder, f"llvm.{name}.v{block}f32", floats, [value])

    @intrinsic
    def round_block(typing_context, x, codes, scales, sums):
        def codegen(context, builder, signature, arguments):
            x, codes, scales, sums = arguments
            values = at(builder, x, I64(0), floats)
            sizes = call_float(builder, "fabs", values)
            # Of all maxima the one that NaN survives.
            name = f"llvm.vector.reduce.fmaximum.v{block}f32"
            largest = call(builder, name, F32, [sizes])
            usable = builder.fcmp_ordered(">", largest, F32(0.0))
            inverse = builder.fdiv(F32(127.0), largest)
            inverse = builder.select(usable, inverse, F32(0.0))
            scaled = builder.fmul(values, splat(builder, inverse, floats))
            whole = call_float(builder, "rint", scaled)
            name = f"llvm.fptosi.sat.v{block}i32.v{block}f32"
            rounded = call(builder, name, words, [whole])
            shifted = builder.add(rounded, same(words, offset))
            narrow = builder.trunc(shifted, ir.VectorType(I8, block))
            for vector in range(span // 4):
                first = vector // 4 * 16 + vector % 4
                order = [lane + first + 4 * byte for lane in lanes for byte in range(4)]
                place = builder.add(codes, I64(64 * vector))
                put(builder, place, pick(builder, narrow, order))
            scale = builder.fdiv(largest, F32(127.0))
            for number, lane in enumerate(lanes):
                place = I64(4 * number)
                put(builder, builder.add(scales, place), scale)
                if offset == 0:
                    part = pick(builder, rounded, list(range(lane, lane + span)))
                    name = f"llvm.vector.reduce.add.v{span}i32"
                    total = call(builder, name, I32, [part])
                    put(builder, builder.add(sums, place), total)
            return context.get_dummy_value()

        address = types.int64
        return types.void(address, address, address, address), codegen

    return round_block
