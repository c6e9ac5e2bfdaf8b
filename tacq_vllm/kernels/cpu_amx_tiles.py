"""LLVM code for AMX's tile registers, and how tiles of numbers lie in memory.

A tile is 16 rows of 64 bytes. Those of a weight are 16 of its rows times 32 columns in
bfloat16; those of x are 16 pairs of columns times 16 tokens; their product is 16 rows
times 16 tokens in float32. The columns of a chunk are multiplied in the order in which
they are unpacked, 32 in a step.
"""

import struct
from typing import Any

import numba
from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from tacq_vllm.kernels.cpu_ir import (
    FLOATS,
    I8,
    I16,
    I64,
    LANES,
    call,
    pick_both,
    prefetch,
    put,
)

binding.initialize_native_asmparser()  # It reads the instruction of `round_both`.

ROWS = LANES
"""Of a tile of a weight."""

TOKENS = LANES
"""Of a tile of x."""

TILE_BYTES = 1024

PAIR = 2
"""Tiles of a weight, and at most of x, that are multiplied together."""

AHEAD_BYTES = 128
"""Bytes that are asked for in every step."""

BLOCK_CHUNKS = 2
"""Chunks of a weight that are unpacked and multiplied together, in the first cache."""

MAX_BLOCK_CHUNKS = BLOCK_CHUNKS + 1
"""The most: with a part of one that is left."""

_STRIDE = 64
_NOTHING = ir.VoidType()
_SUMS, _WEIGHT, _X = (0, 1, 2, 3), (4, 5), (6, 7)
"""Numbers of tile registers."""


def chunk_steps(stride: int) -> list[list[int]]:
    """The columns of every step of a chunk, in the order in which they are multiplied.

    The code of column 4 · stride · l + stride · b + v of a chunk is byte b of lane l of
    vector v (see `Rows`). A step takes of every four lanes two.
    """
    return [
        [
            4 * stride * (lane + first) + stride * byte + number
            for four in range(0, LANES, 4)
            for lane in (four, four + 1)
            for byte in range(4)
        ]
        for number in range(stride)
        for first in (0, 2)
    ]


def last_halvings(width: int, steps: int) -> Any:
    """Compile how often `put_steps` halves the number of steps of a row's last chunk.

    Where a half or a quarter of the chunk's columns exist, as many steps hold them.

    Args:
        width: columns of a chunk.
        steps: of a whole one.

    Returns:
        A function of the number of columns.
    """
    by_four = steps % 4 == 0

    @numba.njit
    def halvings(columns):
        rest = columns % width
        if rest == 0 or 2 * rest > width:
            return 0
        return 2 if by_four and 4 * rest <= width else 1

    return halvings


def block_finder(width: int, steps: int) -> Any:
    """Compile the bounds of the block that a chunk belongs to.

    Blocks are of `BLOCK_CHUNKS`. A quarter of a chunk that is left belongs to the one
    before: sums go through memory for every block.

    Args:
        width: columns of a chunk.
        steps: of a whole one.

    Returns:
        A function of the chunk and the number of columns: the block's first chunk, and
        the one that follows its last.
    """
    halve = last_halvings(width, steps)

    @numba.njit
    def find_block(chunk, columns):
        chunks = (columns + width - 1) // width
        blocks = (chunks + BLOCK_CHUNKS - 1) // BLOCK_CHUNKS
        is_alone = chunks % BLOCK_CHUNKS == 1
        if is_alone and blocks > 1 and halve(columns) == 2:
            blocks -= 1
        block = min(chunk // BLOCK_CHUNKS, blocks - 1)
        first = block * BLOCK_CHUNKS
        return first, chunks if block == blocks - 1 else first + BLOCK_CHUNKS

    return find_block


def put_steps(builder: Any, place: Any, vectors: list[Any], halvings: Any) -> None:
    """Store the vectors of a chunk's steps, each to its tile, folded as often as said.

    `halvings` is an LLVM value as `last_halvings` tells; None: not at all.
    """

    def put_all(vectors: list[Any]) -> None:
        for number, vector in enumerate(vectors):
            put(builder, builder.add(place, I64(number * TILE_BYTES)), vector)

    if halvings is None:
        put_all(vectors)
        return
    for count in range(3 if len(vectors) % 4 == 0 else 2):
        with builder.if_then(builder.icmp_unsigned("==", halvings, I64(count))):
            put_all(_fold(builder, vectors, count))


def _fold(builder: Any, vectors: list[Any], halvings: int) -> list[Any]:
    """Put the first halves or quarters of 2 or 4 vectors of words together."""
    width = LANES >> halvings
    while width < LANES:
        order = [*range(width), *range(LANES, LANES + width)] * (LANES // (2 * width))
        pairs = zip(vectors[::2], vectors[1::2], strict=True)
        vectors = [pick_both(builder, *pair, order) for pair in pairs]
        width *= 2
    return vectors


def round_both(builder: Any, first: Any, second: Any) -> Any:
    """Two vectors of floats, the one after the other, in bfloat16: [2 · LANES]."""
    kind = ir.FunctionType(ir.VectorType(I16, 2 * LANES), [FLOATS, FLOATS])
    # As an LLVM function it has another type in each version, which llvmlite lacks.
    instruction = ir.InlineAsm(kind, "vcvtne2ps2bf16 $1, $2, $0", "=v,v,v")
    return builder.call(instruction, [first, second])


def tiles_starter() -> Any:
    """Intrinsic: set the registers up for this thread."""
    rows = bytes([16] * 8 + [0] * 8)
    widths = [_STRIDE] * 8 + [0] * 8
    # As the processor reads them: palette 1.
    layout = struct.pack("<16B16H", 1, *[0] * 15, *widths) + rows

    @intrinsic
    def start(typing_context):
        def codegen(context, builder, signature, arguments):
            kind = ir.ArrayType(I8, len(layout))
            constant = ir.Constant(kind, bytearray(layout))
            place = cgutils.global_constant(builder.module, "tile_layout", constant)
            pointer = builder.bitcast(place, I8.as_pointer())
            call(builder, "llvm.x86.ldtilecfg", _NOTHING, [pointer])
            return context.get_dummy_value()

        return types.void(), codegen

    return start


def tiles_ender() -> Any:
    """Intrinsic: give the registers back."""

    @intrinsic
    def end(typing_context):
        def codegen(context, builder, signature, arguments):
            call(builder, "llvm.x86.tilerelease", _NOTHING, [])
            return context.get_dummy_value()

        return types.void(), codegen

    return end


def tiles_product(count: int) -> Any:
    """Intrinsic: add the products of two tiles' rows and `count` tiles of tokens.

    It takes two addresses of tiles of a weight, one for each step, and `count` of x;
    the number of steps; whether sums begin; the addresses of the sums: those of every
    tile of x with the first tile's rows, then with the second's; and that of memory to
    ask for, `AHEAD_BYTES` a step.

    Tiles of x and sums do not stay in the first cache, those of the weight do.
    """
    pairs = [(row, token) for row in range(PAIR) for token in range(count)]

    @intrinsic
    def multiply(typing_context, weights, tokens, steps, begins, sums, ahead):
        def codegen(context, builder, signature, arguments):
            weights, tokens = (
                cgutils.unpack_tuple(builder, value) for value in arguments[:2]
            )
            steps, begins = arguments[2:4]
            sums = cgutils.unpack_tuple(builder, arguments[4])
            ahead = arguments[5]
            with builder.if_else(begins) as (then, otherwise):
                with then:
                    for total in _SUMS[: len(pairs)]:
                        _on_tiles(builder, "tilezero", total)
                with otherwise:
                    for total, place in zip(_SUMS, sums, strict=False):
                        _stream(builder, total, place)
            with cgutils.for_range(builder, steps, intp=I64) as step:
                offset = builder.mul(step.index, I64(TILE_BYTES))
                for register, place in zip(_WEIGHT, weights, strict=True):
                    _load(builder, register, builder.add(place, offset))
                for register, place in zip(_X, tokens, strict=False):
                    _stream(builder, register, builder.add(place, offset))
                offset = builder.mul(step.index, I64(AHEAD_BYTES))
                prefetch(builder, builder.add(ahead, offset), AHEAD_BYTES)
                for total, (row, token) in zip(_SUMS, pairs, strict=False):
                    _on_tiles(builder, "tdpbf16ps", total, _WEIGHT[row], _X[token])
            for total, place in zip(_SUMS, sums, strict=False):
                _store(builder, total, place)
            return context.get_dummy_value()

        number = types.int64
        return types.void(
            types.UniTuple(number, PAIR),
            types.UniTuple(number, count),
            number,
            types.boolean,
            types.UniTuple(number, len(pairs)),
            number,
        ), codegen

    return multiply


def _load(builder: Any, tile: int, place: Any) -> None:
    _move(builder, "tileloadd64", tile, place)


def _stream(builder: Any, tile: int, place: Any) -> None:
    _move(builder, "tileloaddt164", tile, place)


def _store(builder: Any, tile: int, place: Any) -> None:
    _move(builder, "tilestored64", tile, place)


def _move(builder: Any, name: str, tile: int, place: Any) -> None:
    pointer = builder.inttoptr(place, I8.as_pointer())
    arguments = [I8(tile), pointer, I64(_STRIDE)]
    call(builder, f"llvm.x86.{name}", _NOTHING, arguments)


def _on_tiles(builder: Any, name: str, *tiles: int) -> None:
    call(builder, f"llvm.x86.{name}", _NOTHING, [I8(tile) for tile in tiles])
