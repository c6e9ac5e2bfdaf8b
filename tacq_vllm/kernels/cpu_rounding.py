"""LLVM code that rounds activations to 8 bits, for the kernels of `cpu_int8`."""

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
    splat,
)

BLOCK = 32
"""Columns of x that share a scale."""

ARGUMENTS = (
    "x",
    "codes",
    "scales",
    "sums",
    "columns",
    "chunks",
    "first_row",
    "last_row",
)
"""What the rounding kernel is given; its rows are the tokens."""


def chunk_columns(bits: int) -> int:
    """Columns whose low codes fill 64 bytes."""
    return 128 if bits == 4 else 256


def compile_rounding(bits: int, team: Team) -> Any:
    """Compile the rounding of x to 8 bits, in the order in which codes are unpacked.

    Per token and block of columns: scale = max|x| / 127, code = round(x / scale). The
    scale and the sum of scale · code are stored for each lane.
    """
    share, round_block = row_sharer(team, ARGUMENTS), _round_block(bits)
    chunk = chunk_columns(bits)
    lanes = LANES * BLOCK // chunk

    @numba.cfunc(types.void(types.voidptr))
    def body(pointer):
        a = numba.carray(pointer, len(ARGUMENTS), numba.int64)
        columns, chunks = a[4], a[5]
        start, stop = share(a)
        for token in range(start, stop):
            for block in range(columns // BLOCK):
                place = (token * chunks * LANES + block * lanes) * 4
                column = block * BLOCK
                first = token * chunks * chunk + column // chunk * chunk
                round_block(
                    a[0] + (token * columns + column) * 4,
                    a[1] + first + column % chunk * 64 // chunk,
                    a[2] + place,
                    a[3] + place,
                )

    return body


def _round_block(bits: int) -> Any:
    """Intrinsic: one block of x to bytes, with the scale and sum of each lane."""
    step = 2 if bits == 4 else 4
    span = chunk_columns(bits) // LANES
    floats = ir.VectorType(F32, BLOCK)
    words = ir.VectorType(I32, BLOCK)

    @intrinsic
    def round_block(typing_context, x, codes, scales, sums):
        def codegen(context, builder, signature, arguments):
            x, codes, scales, sums = arguments
            values = at(builder, x, I64(0), floats)
            sizes = call(builder, "llvm.fabs.v32f32", floats, [values])
            # Of all maxima the one that NaN survives.
            largest = call(builder, "llvm.vector.reduce.fmaximum.v32f32", F32, [sizes])
            usable = builder.fcmp_ordered(">", largest, F32(0.0))
            inverse = builder.fdiv(F32(127.0), largest)
            inverse = builder.select(usable, inverse, F32(0.0))
            scaled = builder.fmul(values, splat(builder, inverse, floats))
            whole = call(builder, "llvm.rint.v32f32", floats, [scaled])
            name = "llvm.fptosi.sat.v32i32.v32f32"
            rounded = call(builder, name, words, [whole])
            narrow = builder.trunc(rounded, ir.VectorType(I8, BLOCK))
            for number in range(step):
                part = pick(builder, narrow, list(range(number, BLOCK, step)))
                put(builder, builder.add(codes, I64(64 * number)), part)
            scale = builder.fdiv(largest, F32(127.0))
            for lane in range(BLOCK // span):
                part = pick(
                    builder, rounded, list(range(lane * span, (lane + 1) * span))
                )
                name = f"llvm.vector.reduce.add.v{span}i32"
                total = builder.sitofp(call(builder, name, I32, [part]), F32)
                offset = I64(4 * lane)
                put(builder, builder.add(scales, offset), scale)
                put(builder, builder.add(sums, offset), builder.fmul(total, scale))
            return context.get_dummy_value()

        address = types.int64
        return types.void(address, address, address, address), codegen

    return round_block
