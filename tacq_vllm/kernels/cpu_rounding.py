"""LLVM code that rounds activations to 8 bits, for the kernels that multiply bytes."""

from dataclasses import dataclass
from typing import Any

import numba
import torch
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
    same,
    sharer,
    splat,
    stored_type,
    to_float,
)

ARGUMENTS = (
    "x",
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
)
"""What int8 kernels are given, as 64-bit integers, before the addresses of a weight.

Addresses of x [tokens, in]; of memory for what is made of x; of the output [tokens,
out], with room for whole tiles. Then sizes.
"""


@dataclass(frozen=True)
class Rounding:
    """What x becomes.

    For every tile of `out_tile` tokens, `x_tiles` has x itself, float32 [in, out_tile].
    For every tile of `tile` tokens and every chunk of columns there are, each
    [tile, …], `codes`: bytes, in the order in which codes are unpacked; `scales`:
    float32, one per lane; `sums`, without an offset: int32, of the bytes of each lane.
    """

    dtype: torch.dtype
    """The type of x."""

    span: int
    """Columns of a lane."""

    stride: int
    """Columns from a byte of a lane to the next; see `Rows`."""

    block: int
    """Columns of x that share a scale: a few lanes, or one."""

    offset: int
    """What is added to the bytes."""

    tile: int
    out_tile: int

    @property
    def columns(self) -> int:
        """Columns of a chunk."""
        return LANES * self.span


def rounder(rounding: Rounding, team: Team) -> Any:
    """Compile the rounding of x by all threads of a team, before they go on.

    Per token and block of columns: scale = max|x| / 127, code = round(x / scale).
    """
    share, wait = sharer(team), team.wait
    round_block, no_scale = _round_block(rounding), _no_scale()
    size = rounding.dtype.itemsize
    block, span, tile = rounding.block, rounding.span, rounding.tile
    out_tile, chunk_size = rounding.out_tile, rounding.columns

    @numba.njit
    def round_tokens(a):
        x, tiles, codes, scales, sums = a[0], a[1], a[2], a[3], a[4]
        columns, chunks = a[7], a[8]
        start, stop = share(0, a[6])
        for token in range(start, stop):
            first = token // tile * tile * chunks + token % tile
            target = tiles + (token // out_tile * columns * out_tile) * 4
            for column in range(0, columns, block):
                part = first + column // chunk_size * tile
                lane = column % chunk_size // span
                place = (part * LANES + lane) * 4
                round_block(
                    x + (token * columns + column) * size,
                    target + (column * out_tile + token % out_tile) * 4,
                    codes + part * chunk_size + lane * 4,
                    scales + place,
                    sums + place,
                )
            last = first + (chunks - 1) * tile
            for lane in range(columns // span - (chunks - 1) * LANES, LANES):
                no_scale(scales + (last * LANES + lane) * 4)
        wait()

    return round_tokens


def _no_scale() -> Any:
    """Intrinsic: store 0 as the scale of a lane behind the last column."""

    @intrinsic
    def no_scale(typing_context, place):
        def codegen(context, builder, signature, arguments):
            put(builder, arguments[0], F32(0.0))
            return context.get_dummy_value()

        return types.void(types.int64), codegen

    return no_scale


def _round_block(rounding: Rounding) -> Any:
    """Intrinsic: one block of x to floats and bytes, with each lane's scale and sum."""
    block, span, offset = rounding.block, rounding.span, rounding.offset
    stride = rounding.stride
    stored = ir.VectorType(stored_type(rounding.dtype), block)
    floats, words = ir.VectorType(F32, block), ir.VectorType(I32, block)
    lanes = range(0, block, span)

    def call_float(builder: Any, name: str, value: Any) -> Any:
        return call(builder, f"llvm.{name}.v{block}f32", floats, [value])

    @intrinsic
    def round_block(typing_context, x, target, codes, scales, sums):
        def codegen(context, builder, signature, arguments):
            x, target, codes, scales, sums = arguments
            values = at(builder, x, I64(0), stored)
            values = to_float(builder, values, rounding.dtype)
            if rounding.out_tile == 1:
                put(builder, target, values)
            else:
                for column in range(block):
                    place = I64(4 * column * rounding.out_tile)
                    value = builder.extract_element(values, I32(column))
                    put(builder, builder.add(target, place), value)
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
                first = vector // stride * 4 * stride + vector % stride
                order = [
                    lane + first + stride * byte for lane in lanes for byte in range(4)
                ]
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
        return types.void(address, address, address, address, address), codegen

    return round_block
