"""What many rows of x become for AMX: pairs of columns times 16 tokens, in bfloat16."""

from dataclasses import dataclass
from typing import Any, ClassVar

import numba
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from tacq_vllm.kernels.cpu_amx_tiles import (
    TILE_BYTES,
    TOKENS,
    block_finder,
    chunk_steps,
    last_halvings,
    put_steps,
)
from tacq_vllm.kernels.cpu_ir import (
    I64,
    LANES,
    WORDS,
    at,
    from_float,
    load_some,
    pick,
    put,
    reserver,
    stored_type,
    to_float,
    transpose,
)


@dataclass(frozen=True)
class AmxTokens:
    """All rows of x; the last is repeated to make whole tiles.

    For every block of chunks, and every 16 tokens, there are the tiles of all steps;
    columns behind the last are zeros.
    """

    dtype: torch.dtype
    """The type of x, which has 16 bits."""

    stride: int
    """See `Rows`."""

    tile: ClassVar[int] = TOKENS

    @property
    def columns(self) -> int:
        """Columns of a chunk."""
        return 4 * LANES * self.stride

    @property
    def chunk_bytes(self) -> int:
        """Of the tiles of a chunk and 16 tokens."""
        return len(chunk_steps(self.stride)) * TILE_BYTES

    def sizes(self, tokens: int, columns: int) -> tuple[int, int, int, int]:
        """Bytes of all tiles; nothing else is made of x."""
        chunks = -(-columns // self.columns)
        return -(-tokens // TOKENS) * chunks * self.chunk_bytes, 0, 0, 0


def tokens_arranger(tokens: AmxTokens) -> Any:
    """Compile the making of tiles.

    It takes the kernel's arguments; the first part to make, and the one that follows
    the last. A part is a chunk of 16 tokens; chunks of the same tokens follow each
    other.
    """
    read, turn = _read_token(tokens), _turn_tokens()
    width, chunk_bytes = tokens.columns, tokens.chunk_bytes
    steps = len(chunk_steps(tokens.stride))
    halve, find_block = last_halvings(width, steps), block_finder(width, steps)
    reserve = reserver(chunk_bytes)

    @numba.njit
    def arrange(a, start, stop):
        x, tiles, count, columns = a[0], a[1], a[6], a[7]
        lines, halvings = reserve(), halve(columns)
        chunks = (columns + width - 1) // width
        size = (count + TOKENS - 1) // TOKENS
        for part in range(start, stop):
            tile, chunk = part // chunks, part % chunks
            for number in range(TOKENS):
                token = min(tile * TOKENS + number, count - 1)
                column = chunk * width
                read(
                    x + (token * columns + column) * 2,
                    min(width, columns - column),
                    lines + number * 64,
                    halvings,
                )
            first, end = find_block(chunk, columns)
            place = first * size + tile * (end - first) + chunk - first
            whole = chunk < columns // width
            for step in range(steps if whole else steps >> halvings):
                offset = step * TILE_BYTES
                turn(lines + offset, tiles + place * chunk_bytes + offset)

    return arrange


def _read_token(tokens: AmxTokens) -> Any:
    """Intrinsic: a chunk of one token, a vector of pairs for every step."""
    kind = ir.VectorType(stored_type(tokens.dtype), tokens.columns)

    @intrinsic
    def read_token(typing_context, x, valid, line, halvings):
        def codegen(context, builder, signature, arguments):
            x, valid, line, halvings = arguments

            def read(stored: Any, halvings: Any) -> None:
                if tokens.dtype != torch.bfloat16:
                    values = to_float(builder, stored, tokens.dtype)
                    stored = from_float(builder, values, torch.bfloat16)
                steps = _steps(builder, stored, tokens.stride)
                put_steps(builder, line, steps, halvings)

            is_whole = builder.icmp_unsigned("==", valid, I64(tokens.columns))
            with builder.if_else(is_whole) as (then, otherwise):
                with then:
                    read(at(builder, x, I64(0), kind), None)
                with otherwise:
                    read(load_some(builder, x, kind, valid), halvings)
            return context.get_dummy_value()

        number = types.int64
        return types.void(number, number, number, number), codegen

    return read_token


def _steps(builder: Any, stored: Any, stride: int) -> list[Any]:
    """Pairs of a chunk's columns, a vector for every step, as `chunk_steps` says.

    Neighbours are brought together where they are, then quarters of vectors moved.
    """
    halves = []
    for first in (0, 2):
        vectors = []
        for four in range(0, LANES, 4):
            columns = [
                4 * stride * (four + first + lane) + stride * byte + number
                for number in (*range(stride), *[0] * (4 - stride))
                for lane in range(2)
                for byte in range(4)
            ]
            vectors.append(builder.bitcast(pick(builder, stored, columns), WORDS))
        halves.append(transpose(builder, vectors)[:stride])
    return [step for pair in zip(*halves, strict=True) for step in pair]


def _turn_tokens() -> Any:
    """Intrinsic: a tile, from rows of tokens to rows of pairs."""

    @intrinsic
    def turn_tokens(typing_context, lines, tile):
        def codegen(context, builder, signature, arguments):
            lines, tile = arguments
            rows = [at(builder, lines, I64(token), WORDS) for token in range(TOKENS)]
            for number, pairs in enumerate(transpose(builder, rows)):
                put(builder, builder.add(tile, I64(64 * number)), pairs)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), codegen

    return turn_tokens
