"""LLVM code of the product of a few panels and tiles of tokens, by Intel's AMX.

A tile register holds 16 rows of 64 bytes. The products of a block of 16 tokens and a
panel are one instruction; what is around it scales and adds up integers.
"""

import functools
import struct
from typing import Any

import torch
from llvmlite import binding, ir
from numba.core import cgutils
from numba.extending import intrinsic

from tacq_vllm.kernels.cpu_ir import (
    F32,
    FLOATS,
    I8,
    I64,
    WORDS,
    at,
    call,
    multiply_add,
    put,
    same,
    splat,
)
from tacq_vllm.kernels.cpu_panels import PANELS, ROWS, Panels
from tacq_vllm.kernels.cpu_tile_dots import PRODUCT_TYPE
from tacq_vllm.kernels.cpu_token_tiles import SUMS_BYTES, TOKENS

BIAS = 0
"""What weights must have added."""

_NOTHING = ir.VoidType()
_X = 0
_WEIGHTS = (1, 2, 3)
_PRODUCTS = (4, 5, 6)
"""Numbers of tile registers."""


@functools.cache
def has_amx() -> bool:
    """Whether the processor has AMX for bytes, and the system lets this process use it.

    The process asks for that once; its other threads may use it then, too.
    """
    features = binding.get_host_cpu_features()
    return bool(features.get("amx-int8")) and bool(torch.cpu._init_amx())


def amx_product(panels: Panels) -> Any:
    """Intrinsic of `PRODUCT_TYPE`."""
    layout = _layout(panels.block)

    @intrinsic
    def multiply(typing_context, lines, tile, stride, tokens, count, first, sums):
        def codegen(context, builder, signature, arguments):
            lines, tile = (
                cgutils.unpack_tuple(builder, value) for value in arguments[:2]
            )
            codes, scales, _ = tile
            stride, tokens, count, first, sums = arguments[2:]
            whole = builder.add(tokens, I64(TOKENS - 1))
            tiles = builder.udiv(whole, I64(TOKENS))
            size = PANELS * SUMS_BYTES
            with builder.goto_entry_block():
                scratch = builder.alloca(I8, size)
                scratch.align = 64
            products = builder.ptrtoint(scratch, I64)
            begins = builder.icmp_unsigned("==", first, I64(0))
            with builder.if_then(begins):
                vectors = builder.mul(tiles, I64(size // 64))
                with cgutils.for_range(builder, vectors, intp=I64) as vector:
                    place = builder.mul(vector.index, I64(64))
                    put(builder, builder.add(sums, place), same(FLOATS, 0))
            _configure(builder, layout)
            with cgutils.for_range(builder, count, intp=I64) as block:
                offset = builder.mul(block.index, I64(panels.block_bytes))
                places = [builder.add(line, offset) for line in lines]
                for register, place in zip(_WEIGHTS, places, strict=True):
                    _load(builder, register, place, 64)
                weight_scales = [
                    at(builder, place, I64(panels.words), FLOATS) for place in places
                ]
                with cgutils.for_range(builder, tiles, intp=I64) as tile:
                    part = builder.add(builder.mul(tile.index, stride), block.index)
                    part = builder.mul(part, I64(TOKENS))
                    x = builder.add(codes, builder.mul(part, I64(panels.block)))
                    _load(builder, _X, x, panels.block)
                    for number, result in enumerate(_PRODUCTS):
                        _tiles(builder, "tilezero", result)
                        _tiles(builder, "tdpbssd", result, _X, _WEIGHTS[number])
                        place = builder.add(products, I64(number * SUMS_BYTES))
                        _store(builder, result, place)
                    totals = builder.add(sums, builder.mul(tile.index, I64(size)))
                    for token in range(TOKENS):
                        number = builder.add(part, I64(token))
                        x_scale = at(builder, scales, number, F32)
                        x_scale = splat(builder, x_scale, FLOATS)
                        for panel, weight_scale in enumerate(weight_scales):
                            vector = panel * TOKENS + token
                            whole = at(builder, products, I64(vector), WORDS)
                            term = builder.fmul(builder.sitofp(whole, FLOATS), x_scale)
                            total = at(builder, totals, I64(vector), FLOATS)
                            total = multiply_add(builder, weight_scale, term, total)
                            put(builder, builder.add(totals, I64(64 * vector)), total)
            call(builder, "llvm.x86.tilerelease", _NOTHING, [])
            return context.get_dummy_value()

        return PRODUCT_TYPE, codegen

    return multiply


def _layout(block: int) -> bytes:
    """The registers' sizes, as the processor reads them (palette 1)."""
    rows, widths = [0] * 16, [0] * 16
    for tile, height, width in (
        (_X, TOKENS, block),
        *((tile, block // 4, 64) for tile in _WEIGHTS),
        *((tile, TOKENS, ROWS * 4) for tile in _PRODUCTS),
    ):
        rows[tile], widths[tile] = height, width
    return struct.pack("<16B16H16B", 1, *[0] * 15, *widths, *rows)


def _configure(builder: Any, layout: bytes) -> None:
    kind = ir.ArrayType(I8, len(layout))
    constant = ir.Constant(kind, bytearray(layout))
    place = cgutils.global_constant(builder.module, "tile_layout", constant)
    pointer = builder.bitcast(place, I8.as_pointer())
    call(builder, "llvm.x86.ldtilecfg", _NOTHING, [pointer])


def _load(builder: Any, tile: int, place: Any, stride: int) -> None:
    pointer = builder.inttoptr(place, I8.as_pointer())
    arguments = [I8(tile), pointer, I64(stride)]
    call(builder, "llvm.x86.tileloadd64", _NOTHING, arguments)


def _store(builder: Any, tile: int, place: Any) -> None:
    pointer = builder.inttoptr(place, I8.as_pointer())
    arguments = [I8(tile), pointer, I64(ROWS * 4)]
    call(builder, "llvm.x86.tilestored64", _NOTHING, arguments)


def _tiles(builder: Any, name: str, *tiles: int) -> None:
    call(builder, f"llvm.x86.{name}", _NOTHING, [I8(tile) for tile in tiles])
