"""Few rows of x as floats, and their products with a weight's codes."""

from dataclasses import dataclass
from typing import Any, ClassVar

import numba
import torch
from numba import types
from numba.extending import intrinsic

from tacq_vllm.kernels.cpu_chunks import ChunkReader
from tacq_vllm.kernels.cpu_ir import (
    F32,
    FLOATS,
    I64,
    LANES,
    Team,
    add_product,
    at,
    put,
    sharer,
    zeroed,
)
from tacq_vllm.kernels.cpu_rows import Row


@dataclass(frozen=True)
class FloatLanes:
    """Floats that lie as those of a chunk are unpacked; see `Lanes`.

    `tiles` has, for every chunk of columns, [tile, columns of a lane, lanes]; zeros
    where there is no column.
    """

    reader: ChunkReader

    tile: int
    """Tokens."""

    dtype: ClassVar[torch.dtype] = torch.float32

    @property
    def part(self) -> int:
        """See `Lanes`."""
        return 32 // self.tile

    def sizes(self, tokens: int, columns: int) -> tuple[int, int, int, int]:
        """See `Layout`."""
        chunks = -(-columns // self.reader.columns)
        return self.tile * chunks * self.reader.columns * 4, 0, 0, 0

    def arranger(self, team: Team) -> Any:
        """See `Lanes`."""
        share, wait, move = sharer(team), team.wait, _mover()
        tile, width, span = self.tile, self.reader.columns, self.reader.span
        order = tuple(self.reader.lane_order)

        @numba.njit
        def arrange(a):
            x, tiles, tokens, columns = a[0], a[1], a[6], a[7]
            chunks = (columns + width - 1) // width
            start, stop = share(0, chunks * tile)
            for part in range(start, stop):
                first = part // tile * width
                line = x + (min(part % tile, tokens - 1) * columns + first) * 4
                lanes = min(width, columns - first) // span
                place = tiles + part * width * 4
                for column in order:
                    for lane in range(LANES):
                        source = line + (lane * span + column) * 4
                        move(source, lane < lanes, place)
                        place += 4
            wait()

        return arrange

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
        reader, (scale, zero) = self.reader, grid
        weights = reader.floats(builder, row, index, rest, zero)
        line_bytes = reader.columns * 4
        first = builder.mul(index, I64(self.tile * line_bytes))
        for token, total in enumerate(totals):
            place = builder.add(areas[0], builder.add(first, I64(token * line_bytes)))
            acc = zeroed(builder)
            for number, weight in enumerate(weights):
                add_product(
                    builder, acc, weight, at(builder, place, I64(number), FLOATS)
                )
            add_product(builder, total, scale, builder.load(acc))


def _mover() -> Any:
    """Intrinsic: copy a float from an address, or 0 if it is not there, to another."""

    @intrinsic
    def move(typing_context, source, is_there, target):
        def codegen(context, builder, signature, arguments):
            source, is_there, target = arguments
            put(builder, target, F32(0.0))
            with builder.if_then(is_there):
                put(builder, target, at(builder, source, I64(0), F32))
            return context.get_dummy_value()

        number = types.int64
        return types.void(number, types.boolean, number), codegen

    return move
