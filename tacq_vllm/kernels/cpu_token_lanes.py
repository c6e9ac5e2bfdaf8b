"""What few rows of x become: bytes that lie as the codes of a chunk are unpacked."""

from dataclasses import dataclass
from typing import Any

import numba
import torch
from numba import types
from numba.extending import intrinsic

from tacq_vllm.kernels.cpu_ir import F32, I32, I64, LANES, Team, pick, put, sharer
from tacq_vllm.kernels.cpu_rounding import ordered_codes, round_block, sum_codes


@dataclass(frozen=True)
class TokenLanes:
    """All rows of x; the last is repeated to make a tile.

    `x_tiles` has x itself, [in, tile]. For every chunk of columns there are,
    each [tile, …], `codes`: bytes; `scales`: float32, one per lane; `sums`: int32, of
    the codes of each lane.
    """

    dtype: torch.dtype
    """The type of x."""

    stride: int
    """Columns from a byte of a lane's word to the next; see `Rows`."""

    block: int
    """Columns of x that share a scale: one lane or more."""

    tile: int
    """Tokens."""

    @property
    def span(self) -> int:
        """Columns of a lane."""
        return 4 * self.stride

    @property
    def columns(self) -> int:
        """Columns of a chunk."""
        return LANES * self.span

    def room(self, tokens: int) -> int:
        """Rows of the output that are written."""
        return self.tile

    def sizes(self, tokens: int, columns: int) -> tuple[int, int, int, int]:
        """Bytes of what is made of x: of the tiles, codes, scales and sums."""
        chunks = -(-columns // self.columns)
        lanes = self.tile * chunks * LANES * 4
        codes = self.tile * chunks * self.columns
        return self.tile * columns * self.dtype.itemsize, codes, lanes, lanes


def lanes_rounder(lanes: TokenLanes, team: Team) -> Any:
    """Compile the rounding of x by all threads of a team, before they go on."""
    share, wait = sharer(team), team.wait
    round_lanes, no_scale = _round_lanes(lanes), _no_scale()
    size, block, span, tile = lanes.dtype.itemsize, lanes.block, lanes.span, lanes.tile
    chunk_size = lanes.columns

    @numba.njit
    def round_tokens(a):
        x, tiles, codes, scales, sums = a[0], a[1], a[2], a[3], a[4]
        tokens, columns = a[6], a[7]
        chunks = (columns + chunk_size - 1) // chunk_size
        start, stop = share(0, tile)
        for token in range(start, stop):
            line = x + min(token, tokens - 1) * columns * size
            for column in range(0, columns, block):
                part = column // chunk_size * tile + token
                lane = column % chunk_size // span
                place = (part * LANES + lane) * 4
                round_lanes(
                    line + column * size,
                    tiles + (column * tile + token) * size,
                    codes + part * chunk_size + lane * 4,
                    scales + place,
                    sums + place,
                )
            last = (chunks - 1) * tile + token
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


def _round_lanes(lanes: TokenLanes) -> Any:
    """Intrinsic: one block of x, as it is and in bytes, with lanes' scales and sums."""
    block, span, tile = lanes.block, lanes.span, lanes.tile
    itemsize = lanes.dtype.itemsize

    @intrinsic
    def round_lanes(typing_context, x, target, codes, scales, sums):
        def codegen(context, builder, signature, arguments):
            x, target, codes, scales, sums = arguments
            rounded = round_block(builder, x, block, lanes.dtype)
            if tile == 1:
                put(builder, target, rounded.stored)
            else:
                for column in range(block):
                    place = builder.add(target, I64(itemsize * column * tile))
                    value = builder.extract_element(rounded.stored, I32(column))
                    put(builder, place, value)
            words = ordered_codes(builder, rounded.codes, span, lanes.stride)
            size = block // lanes.stride
            for number in range(lanes.stride):
                part = list(range(number * size, (number + 1) * size))
                place = builder.add(codes, I64(64 * number))
                put(builder, place, pick(builder, words, part))
            for number, lane in enumerate(range(0, block, span)):
                total = sum_codes(builder, rounded.codes, lane, span)
                for base, value in ((scales, rounded.scale), (sums, total)):
                    put(builder, builder.add(base, I64(4 * number)), value)
            return context.get_dummy_value()

        address = types.int64
        return types.void(address, address, address, address, address), codegen

    return round_lanes
