"""Few rows of x in 8 bits, and their products with a weight's codes.

Products of bytes are summed in integers over the columns of a lane, then scaled: a lane
lies inside one group, and inside one block of x.
"""

from dataclasses import dataclass
from typing import Any

import numba
import torch
from numba import types
from numba.extending import intrinsic

from tacq_vllm.kernels.cpu_chunks import ChunkReader
from tacq_vllm.kernels.cpu_dots import DOTS
from tacq_vllm.kernels.cpu_ir import (
    F32,
    FLOATS,
    I64,
    LANES,
    WORDS,
    Team,
    add_product,
    at,
    pick,
    put,
    sharer,
)
from tacq_vllm.kernels.cpu_rounding import ordered_codes, round_block, sum_codes
from tacq_vllm.kernels.cpu_rows import Row


@dataclass(frozen=True)
class ByteLanes:
    """Bytes that lie as the codes of a chunk are unpacked; see `Lanes`.

    For every chunk of columns there are, each [tile, …], `codes`: bytes; `scales`:
    float32, one per lane; `sums`: int32, of the codes of each lane.
    """

    reader: ChunkReader

    dtype: torch.dtype
    """The type of x."""

    block: int
    """Columns of x that share a scale: one lane or more."""

    tile: int
    """Tokens."""

    dot: str
    """Instructions for products of bytes: `avx512vnni`, `avx2` or `plain`."""

    @property
    def part(self) -> int:
        """See `Lanes`."""
        return 64 // self.tile

    def sizes(self, tokens: int, columns: int) -> tuple[int, int, int, int]:
        """See `Layout`."""
        chunks = -(-columns // self.reader.columns)
        lanes = self.tile * chunks * LANES * 4
        return 0, self.tile * chunks * self.reader.columns, lanes, lanes

    def arranger(self, team: Team) -> Any:
        """See `Lanes`."""
        share, wait = sharer(team), team.wait
        round_lanes, no_scale = _round_lanes(self), _no_scale()
        size, block, tile = self.dtype.itemsize, self.block, self.tile
        chunk_size, span = self.reader.columns, self.reader.span

        @numba.njit
        def round_tokens(a):
            x, codes, scales, sums, tokens, columns = a[0], a[2], a[3], a[4], a[6], a[7]
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
                        codes + part * chunk_size + lane * 4,
                        scales + place,
                        sums + place,
                    )
                last = (chunks - 1) * tile + token
                for lane in range(columns // span - (chunks - 1) * LANES, LANES):
                    no_scale(scales + (last * LANES + lane) * 4)
            wait()

        return round_tokens

    def add_chunk(
        self,
        builder: Any,
        row: Row,
        areas: list[Any],
        index: Any,
        rest: Any,
        grid: tuple[Any, Any],
        totals: list[Any],
    ) -> None:
        """See `Lanes`."""
        reader = self.reader
        codes = reader.rows.codes(builder, row, index, rest)
        scale, zero = grid
        minus_zero = builder.neg(zero)
        _, x_codes, x_scales, x_sums = areas
        for token, total in enumerate(totals):
            part = builder.add(builder.mul(index, I64(self.tile)), I64(token))
            place = builder.add(x_codes, builder.mul(part, I64(reader.columns)))
            # Of Σ x·(code - zero) the second part.
            acc = builder.mul(minus_zero, at(builder, x_sums, part, WORDS))
            for number, weights in enumerate(codes):
                x = at(builder, place, I64(number), WORDS)
                acc = DOTS[self.dot](builder, acc, weights, x)
            x_scale = at(builder, x_scales, part, FLOATS)
            term = builder.fmul(builder.sitofp(acc, FLOATS), x_scale)
            add_product(builder, total, scale, term)


def _no_scale() -> Any:
    """Intrinsic: store 0 as the scale of a lane behind the last column."""

    @intrinsic
    def no_scale(typing_context, place):
        def codegen(context, builder, signature, arguments):
            put(builder, arguments[0], F32(0.0))
            return context.get_dummy_value()

        return types.void(types.int64), codegen

    return no_scale


def _round_lanes(lanes: ByteLanes) -> Any:
    """Intrinsic: one block of x in bytes, with lanes' scales and sums."""
    block, span, stride = lanes.block, lanes.reader.span, lanes.reader.rows.stride

    @intrinsic
    def round_lanes(typing_context, x, codes, scales, sums):
        def codegen(context, builder, signature, arguments):
            x, codes, scales, sums = arguments
            rounded = round_block(builder, x, block, lanes.dtype)
            words = ordered_codes(builder, rounded.codes, span, stride)
            size = block // stride
            for number in range(stride):
                part = list(range(number * size, (number + 1) * size))
                place = builder.add(codes, I64(64 * number))
                put(builder, place, pick(builder, words, part))
            for number, lane in enumerate(range(0, block, span)):
                total = sum_codes(builder, rounded.codes, lane, span)
                for base, value in ((scales, rounded.scale), (sums, total)):
                    put(builder, builder.add(base, I64(4 * number)), value)
            return context.get_dummy_value()

        address = types.int64
        return types.void(address, address, address, address), codegen

    return round_lanes
