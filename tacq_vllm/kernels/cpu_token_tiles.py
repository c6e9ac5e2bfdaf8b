"""What many rows of x become: bytes in tiles of 16 tokens and one block of columns."""

from dataclasses import dataclass
from typing import Any, ClassVar

import numba
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from tacq_vllm.kernels.cpu_dots import BIAS
from tacq_vllm.kernels.cpu_ir import (
    I32,
    I64,
    LANES,
    Team,
    at,
    put,
    reserver,
    sharer,
    stored_type,
    transpose,
)
from tacq_vllm.kernels.cpu_rounding import ordered_codes, round_block, sum_codes

TOKENS = LANES
"""Of a tile."""

SUMS_BYTES = TOKENS * LANES * 4
"""Of a tile's sums with a panel of a weight."""


@dataclass(frozen=True)
class TokenTiles:
    """All rows of x; the last is repeated to make whole tiles.

    For every tile, `tiles` has x itself, [in, TOKENS]; and for every block of
    columns there are `codes`: bytes [TOKENS, block]; `scales`: float32 [TOKENS];
    `sums`: int32 [TOKENS], what each token's integer sums begin with: of what the
    weights' bias adds, the negative.
    """

    dtype: torch.dtype
    """The type of x."""

    stride: int
    """Columns from a byte of a word to the next; see `Rows`."""

    block: int
    """Columns of x that share a scale: whole lanes, and a multiple of 16."""

    tile: ClassVar[int] = TOKENS

    @property
    def span(self) -> int:
        """Columns of a lane."""
        return 4 * self.stride

    def sizes(self, tokens: int, columns: int) -> tuple[int, int, int, int]:
        """Bytes of what is made of x: of the tiles, codes, scales and sums."""
        room = -(-tokens // TOKENS) * TOKENS
        numbers = room * (columns // self.block) * 4
        return room * columns * self.dtype.itemsize, room * columns, numbers, numbers


def tiles_rounder(tiles: TokenTiles, team: Team) -> Any:
    """Compile the rounding of x by all threads of a team, before they go on."""
    share, wait = sharer(team), team.wait
    round_token, turn = _round_token(tiles), _turn(tiles.dtype)
    size, block = tiles.dtype.itemsize, tiles.block
    reserve = reserver(TOKENS * block * size)

    @numba.njit
    def round_tokens(a):
        x, x_tiles, codes, scales, sums = a[0], a[1], a[2], a[3], a[4]
        tokens, columns = a[6], a[7]
        blocks = columns // block
        values = reserve()
        start, stop = share(0, (tokens + TOKENS - 1) // TOKENS * blocks)
        for part in range(start, stop):
            first = part // blocks * TOKENS
            column = part % blocks * block
            for number in range(TOKENS):
                token = min(first + number, tokens - 1)
                place = (part * TOKENS + number) * 4
                round_token(
                    x + (token * columns + column) * size,
                    values + number * block * size,
                    codes + (part * TOKENS + number) * block,
                    scales + place,
                    sums + place,
                )
            target = x_tiles + (first * columns + column * TOKENS) * size
            for step in range(0, block, LANES):
                turn(values + step * size, block * size, target + step * TOKENS * size)
        wait()

    return round_tokens


def _round_token(tiles: TokenTiles) -> Any:
    """Intrinsic: one block of a token, as it is and in bytes, with scale and sum."""
    block, span = tiles.block, tiles.span

    @intrinsic
    def round_token(typing_context, x, values, codes, scale, total):
        def codegen(context, builder, signature, arguments):
            x, values, codes, scale, total = arguments
            rounded = round_block(builder, x, block, tiles.dtype)
            put(builder, values, rounded.stored)
            put(
                builder,
                codes,
                ordered_codes(builder, rounded.codes, span, tiles.stride),
            )
            put(builder, scale, rounded.scale)
            summed = sum_codes(builder, rounded.codes, 0, block)
            put(builder, total, builder.mul(summed, I32(-BIAS)))
            return context.get_dummy_value()

        address = types.int64
        return types.void(address, address, address, address, address), codegen

    return round_token


def _turn(dtype: torch.dtype) -> Any:
    """Intrinsic: 16 columns of 16 tokens, from rows of tokens to rows of columns."""
    kind, size = ir.VectorType(stored_type(dtype), LANES), dtype.itemsize

    @intrinsic
    def turn(typing_context, source, stride, target):
        def codegen(context, builder, signature, arguments):
            source, stride, target = arguments
            rows = [
                at(
                    builder,
                    builder.add(source, builder.mul(stride, I64(token))),
                    I64(0),
                    kind,
                )
                for token in range(TOKENS)
            ]
            for number, column in enumerate(transpose(builder, rows)):
                put(builder, builder.add(target, I64(size * TOKENS * number)), column)
            return context.get_dummy_value()

        number = types.int64
        return types.void(number, number, number), codegen

    return turn
