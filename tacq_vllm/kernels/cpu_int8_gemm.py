"""LLVM code of the product with many rows of x in 8 bits, through numba.

A few panels of the weight are unpacked once for a slab of tokens, then multiplied with
a few tiles of tokens after the other. Products of bytes are summed in integers over a
block of columns, then scaled: a block lies inside one group, and has one scale of x.
"""

from typing import Any

import numba
import torch
from numba import types
from numba.extending import intrinsic

from tacq_vllm.kernels.cpu_call import ARGUMENTS
from tacq_vllm.kernels.cpu_ir import (
    FLOATS,
    I64,
    Team,
    at,
    from_float,
    put,
    reserver,
    sharer,
    transpose,
)
from tacq_vllm.kernels.cpu_kept import kept_products
from tacq_vllm.kernels.cpu_panels import PANELS, ROWS, Panels, unpacker
from tacq_vllm.kernels.cpu_row_store import put_rows
from tacq_vllm.kernels.cpu_tile_dots import dot_product
from tacq_vllm.kernels.cpu_token_tiles import (
    SUMS_BYTES,
    TOKENS,
    TokenTiles,
    tiles_rounder,
)

_SLAB = 16
"""Tiles of tokens for which panels are unpacked once."""

_TILES = 4
"""Tiles that are multiplied together: their sums stay in the first cache."""

_CHUNKS = 2
"""Chunks of a panel that are unpacked together: half of the first cache."""


def compile_gemm(panels: Panels, tiles: TokenTiles, dot: str, team: Team) -> Any:
    """Compile out[t, r] = x[t] · W[r].

    Args:
        panels: what the weight becomes.
        tiles: what x becomes, with the same blocks.
        dot: instructions for products of bytes, a name of `DOTS`.
        team: where the calling thread is.

    Returns:
        A C function void(int64 *arguments) with an `address`, to be called by every
        thread of a team; a panel of the weight belongs to one thread.
    """
    share = sharer(team)
    round_tokens, unpack = tiles_rounder(tiles, team), unpacker(panels)
    multiply = dot_product(panels, dot)
    put_kept, finish = _kept_putter(panels, tiles.dtype), _finish(tiles)
    row_at = panels.reader.rows.finder()
    out_size, block = tiles.dtype.itemsize, tiles.block
    chunk_size, chunk_blocks = panels.reader.columns, panels.chunk_blocks
    panel_bytes = _CHUNKS * chunk_blocks * panels.block_bytes
    reserve_panels = reserver(PANELS * panel_bytes)
    reserve_totals = reserver(_SLAB * PANELS * SUMS_BYTES)
    reserve_kept = reserver(ROWS * TOKENS * 4)
    head = len(ARGUMENTS)
    arguments = head + panels.reader.rows.addresses

    @numba.cfunc(types.void(types.voidptr))
    def body(pointer):
        a = numba.carray(pointer, arguments, numba.int64)
        weight = a[head:]
        round_tokens(a)
        x, codes, scales, sums, out = a[1], a[2], a[3], a[4], a[5]
        tokens, columns, groups, rows = a[6], a[7], a[8], a[9]
        blocks = columns // block
        chunks = (columns + chunk_size - 1) // chunk_size
        count = (tokens + TOKENS - 1) // TOKENS
        start, stop = share(0, (rows + ROWS - 1) // ROWS)
        unpacked, totals, kept = reserve_panels(), reserve_totals(), reserve_kept()
        for slab in range(0, count, _SLAB):
            slab_end = min(slab + _SLAB, count)
            for panel in range(start, stop, PANELS):
                last_panel = min(panel + PANELS, stop)
                for chunk in range(0, chunks, _CHUNKS):
                    end = min(chunk + _CHUNKS, chunks)
                    # Codes that are unpacked next.
                    ahead = panel * ROWS, end
                    if end == chunks:
                        ahead = last_panel * ROWS, 0
                    for number in range(panel, last_panel):
                        unpack(
                            weight,
                            number * ROWS,
                            chunk,
                            end,
                            columns,
                            groups,
                            rows,
                            unpacked + (number - panel) * panel_bytes,
                            (ahead[0] + (number - panel) * ROWS, ahead[1]),
                        )
                    first = chunk * chunk_blocks
                    size = min(end * chunk_blocks, blocks) - first
                    # Where there are fewer panels the last is multiplied again.
                    last = last_panel - panel - 1
                    lines = (
                        unpacked,
                        unpacked + min(1, last) * panel_bytes,
                        unpacked + min(2, last) * panel_bytes,
                    )
                    for tile in range(slab, slab_end, _TILES):
                        part = (tile * blocks + first) * TOKENS
                        multiply(
                            lines,
                            (codes + part * block, scales + part * 4, sums + part * 4),
                            blocks,
                            min(_TILES * TOKENS, tokens - tile * TOKENS),
                            size,
                            first,
                            totals + (tile - slab) * PANELS * SUMS_BYTES,
                        )
                for number in range(panel, last_panel):
                    first_row = number * ROWS
                    valid = min(ROWS, rows - first_row)
                    for tile in range(slab, slab_end):
                        place = x + tile * TOKENS * columns * out_size
                        for row in range(valid):
                            packed = row_at(
                                weight, first_row + row, columns, groups, rows
                            )
                            put_kept(packed, place, kept + row * TOKENS * 4)
                        done = (tile - slab) * PANELS + number - panel
                        finish(
                            totals + done * SUMS_BYTES,
                            kept,
                            out + (tile * TOKENS * rows + first_row) * out_size,
                            rows,
                            valid,
                        )

    return body


def _kept_putter(panels: Panels, x_dtype: torch.dtype) -> Any:
    """Intrinsic: the products of a row's kept weights with a tile of x, in memory."""
    rows = panels.reader.rows

    @intrinsic
    def put_kept(typing_context, row, x, place):
        def codegen(context, builder, signature, arguments):
            row = rows.unpack(builder, arguments[0])
            x, place = arguments[1:]
            products = kept_products(builder, row, rows.dtype, x, TOKENS, x_dtype)
            put(builder, place, products)
            return context.get_dummy_value()

        return types.void(rows.row_type, types.int64, types.int64), codegen

    return put_kept


def _finish(tiles: TokenTiles) -> Any:
    """Intrinsic: add the kept weights' products to a panel's sums, and store them.

    Sums are [TOKENS, ROWS], the products [ROWS, TOKENS].
    """

    @intrinsic
    def finish(typing_context, totals, kept, out, rows, valid):
        def codegen(context, builder, signature, arguments):
            totals, kept, out, rows, valid = arguments
            products = transpose(
                builder, [at(builder, kept, I64(row), FLOATS) for row in range(ROWS)]
            )
            results = []
            for token, product in enumerate(products):
                total = at(builder, totals, I64(token), FLOATS)
                total = builder.fadd(total, product)
                results.append(from_float(builder, total, tiles.dtype))
            # Over what has been read.
            put_rows(builder, results, out, rows, valid, kept)
            return context.get_dummy_value()

        number = types.int64
        return types.void(number, number, number, number, number), codegen

    return finish
