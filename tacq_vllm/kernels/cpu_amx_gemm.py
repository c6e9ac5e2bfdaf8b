"""LLVM code of the product with many rows of x by AMX, through numba.

A few columns of a pair of panels, 16 rows each, are unpacked to the first cache; then a
slab of tokens passes by. Their x in these columns, and the sums of all panels that are
multiplied with it before the next columns, lie in the second cache.
"""

from typing import Any

import numba
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from tacq_vllm.kernels.cpu_amx_tiles import (
    AHEAD_BYTES,
    MAX_BLOCK_CHUNKS,
    PAIR,
    ROWS,
    TILE_BYTES,
    TOKENS,
    block_finder,
    last_halvings,
    round_both,
    tiles_ender,
    tiles_product,
    tiles_starter,
)
from tacq_vllm.kernels.cpu_amx_tokens import AmxTokens, tokens_arranger
from tacq_vllm.kernels.cpu_amx_weight import AmxWeight, unpacker
from tacq_vllm.kernels.cpu_call import ARGUMENTS
from tacq_vllm.kernels.cpu_ir import (
    FLOATS,
    I16,
    I64,
    LANES,
    WORDS,
    Team,
    at,
    from_float,
    pick,
    pick_both,
    reserver,
    sharer,
    taker,
    transpose,
)
from tacq_vllm.kernels.cpu_row_store import put_rows

_SLAB = 16
"""Tiles of tokens, at most, for which a weight is unpacked once."""

_OWN_TILES = 4
"""Tiles of tokens that make it worth while to unpack all rows for them alone."""

_AGAIN = 3
"""Panels that are unpacked in the time that a tile of another thread's takes to come.

Measured with two threads on a Xeon of the fourth generation.
"""

_UNITS = 2
"""Parts that every thread takes, if rows are shared, and as many pairs of panels."""

_HEIGHT = 32
"""Panels that are multiplied with the same columns of x before the next, at most."""

_ASKED = 8 * AHEAD_BYTES
"""Bytes of a tile of tokens that are asked for beside a panel."""


def compile_gemm(weight: AmxWeight, tokens: AmxTokens, team: Team) -> Any:
    """Compile out[t, r] = x[t] · W[r].

    Args:
        weight: what the weight becomes.
        tokens: what x becomes, with the same stride.
        team: where the calling thread is.

    Returns:
        A C function void(int64 *arguments) with an `address`, to be called by every
        thread of a team; a result belongs to one thread.
    """
    take, share, wait = taker(ARGUMENTS.index("taken")), sharer(team), team.wait
    find_parts, arrange = _parts_finder(team), tokens_arranger(tokens)
    begin, end = tiles_starter(), tiles_ender()
    multiply, finish = _block_product(weight), _block_end(tokens)
    reserve_panels = reserver(PAIR * MAX_BLOCK_CHUNKS * weight.chunk_bytes)
    reserve_sums = reserver(_HEIGHT * _SLAB * TILE_BYTES)
    reserve_kept = reserver(_HEIGHT * ROWS * 4)
    width, arguments = tokens.columns, len(ARGUMENTS) + weight.reader.rows.addresses

    @numba.cfunc(types.void(types.voidptr))
    def body(pointer):
        a = numba.carray(pointer, arguments, numba.int64)
        panels = (a[9] + ROWS - 1) // ROWS
        tiles = (a[6] + TOKENS - 1) // TOKENS
        chunks = (a[7] + width - 1) // width
        depth, size = find_parts(tiles, panels)
        units = (panels + size - 1) // size
        height = min(size, _HEIGHT) if tiles > PAIR else PAIR
        memory = reserve_panels(), reserve_sums(), reserve_kept()
        if units > 1:
            # Every thread needs all of x.
            start, stop = share(0, tiles * chunks)
            arrange(a, start, stop)
            wait()
        begin()
        part = take(pointer)
        while part < units * ((tiles + depth - 1) // depth):
            slab, start = part // units * depth, part % units * size
            slab_end, stop = min(slab + depth, tiles), min(start + size, panels)
            if units == 1:
                # No other thread needs that.
                arrange(a, slab * chunks, slab_end * chunks)
            for first in range(start, stop, height):
                last = min(first + height, stop)
                multiply(a, (slab, slab_end), (first, last), memory)
                finish(a, (slab, slab_end), (first, last), memory)
            part = take(pointer)
        end()

    return body


def _parts_finder(team: Team) -> Any:
    """Compile how work is cut into parts, which threads take in turn.

    Where there are tokens enough a part is of all rows, and the thread makes what it
    needs of x itself: what another thread has made lies in that one's cache. Otherwise
    rows are shared, and no row is unpacked by two threads.

    Returns:
        A function of the numbers of tiles of tokens and of panels: how many of a part.
    """
    num_threads = team.num_threads

    @numba.njit
    def find_parts(tiles, panels):
        threads = num_threads()
        slabs = (tiles + _SLAB - 1) // _SLAB
        parts = (slabs + threads - 1) // threads * threads
        is_unpacked_soon = (parts - slabs) * panels <= _AGAIN * (threads - 1) * tiles
        if tiles >= _OWN_TILES * threads and is_unpacked_soon:
            return (tiles + parts - 1) // parts, panels
        # Even, as panels are multiplied in pairs.
        size = panels // (_UNITS * threads) // PAIR * PAIR
        return _SLAB, max(PAIR, min(size, _HEIGHT))

    return find_parts


def _block_product(weight: AmxWeight) -> Any:
    """Compile the product of some panels and a slab of tokens.

    It takes the kernel's arguments; the first tile of tokens, and the one that follows
    the last; the first panel, and the one that follows the last; and the addresses of
    memory for a pair of panels, for the sums, [panels, _SLAB, ROWS, TOKENS], and for a
    word a row.
    """
    unpack, multiply = unpacker(weight), _panels_product(weight)
    width, chunk_bytes = weight.reader.columns, weight.chunk_bytes
    panel_bytes, steps = MAX_BLOCK_CHUNKS * chunk_bytes, len(weight.steps)
    halve, find_block = last_halvings(width, steps), block_finder(width, steps)
    head = len(ARGUMENTS)

    @numba.njit
    def multiply_block(a, slab, block, memory):
        columns, groups, rows = a[7], a[8], a[9]
        panels, sums, kept = memory
        chunks = (columns + width - 1) // width
        tiles = (a[6] + TOKENS - 1) // TOKENS
        chunk = 0
        while chunk < chunks:
            _, end = find_block(chunk, columns)
            count = (end - chunk) * steps
            if end > columns // width:
                count += (steps >> halve(columns)) - steps
            place = a[1] + (chunk * tiles + slab[0] * (end - chunk)) * chunk_bytes
            next_place = place + tiles * (end - chunk) * chunk_bytes
            for panel in range(block[0], block[1], PAIR):
                pair = min(PAIR, block[1] - panel)
                number = panel - block[0]
                # Codes that are unpacked next.
                ahead = (panel + PAIR) * ROWS, chunk
                if panel + PAIR >= block[1]:
                    ahead = block[0] * ROWS, end
                    if end == chunks:
                        ahead = block[1] * ROWS, 0
                for other in range(pair):
                    unpack(
                        a[head:],
                        (panel + other) * ROWS,
                        chunk,
                        end,
                        columns,
                        groups,
                        rows,
                        panels + other * panel_bytes,
                        kept + (number + other) * ROWS * 4,
                        (ahead[0] + other * ROWS, ahead[1]),
                    )
                multiply(
                    panels,
                    pair,
                    place,
                    slab[1] - slab[0],
                    (end - chunk) * chunk_bytes,
                    count,
                    chunk == 0,
                    sums + number * _SLAB * TILE_BYTES,
                    next_place + number * _ASKED,
                )
            chunk = end

    return multiply_block


def _panels_product(weight: AmxWeight) -> Any:
    """Compile the product of some chunks of a pair of panels and a slab of tokens.

    It takes the address of the panels, and how many; that of the slab's tiles, how many
    tokens' there are, and the bytes of each; the number of steps; whether sums begin,
    and the address of the sums, [PAIR, _SLAB, ROWS, TOKENS]; and that of tiles of which
    a part is asked for.
    """
    multiply_pair, multiply_one = tiles_product(PAIR), tiles_product(1)
    panel_bytes = MAX_BLOCK_CHUNKS * weight.chunk_bytes

    @numba.njit
    def multiply(panels, count, tiles, tokens, size, steps, begins, sums, ahead):
        # If there is no second panel the first is multiplied twice.
        other = count - 1
        lines = panels, panels + other * panel_bytes
        for tile in range(0, tokens, PAIR):
            one, asked = tiles + tile * size, ahead + tile * size
            above = sums + tile * TILE_BYTES
            below = above + other * _SLAB * TILE_BYTES
            if tile + 1 < tokens:
                both = one, one + size
                places = above, above + TILE_BYTES, below, below + TILE_BYTES
                multiply_pair(lines, both, steps, begins, places, asked)
            else:
                ends = above, below
                multiply_one(lines, (one,), steps, begins, ends, asked)

    return multiply


def _block_end(tokens: AmxTokens) -> Any:
    """Compile what stores the sums; it takes what `_block_product` does."""
    finish, reserve = _finish(tokens), reserver(PAIR * TILE_BYTES)

    @numba.njit
    def finish_block(a, slab, block, memory):
        out, rows, sums = a[5], a[9], memory[1]
        spare = reserve()
        for panel in range(block[0], block[1], PAIR):
            row, number = panel * ROWS, (panel - block[0]) * _SLAB
            for tile in range(slab[0], slab[1]):
                finish(
                    sums + (number + tile - slab[0]) * TILE_BYTES,
                    spare,
                    out + (tile * TOKENS * rows + row) * 2,
                    rows,
                    min(PAIR * ROWS, rows - row),
                )

    return finish_block


def _finish(tokens: AmxTokens) -> Any:
    """Intrinsic: store the sums of a pair of panels, [PAIR, _SLAB, ROWS, TOKENS].

    Of those that do not exist anything may be in memory.
    """

    @intrinsic
    def finish(typing_context, sums, spare, out, rows, valid):
        def codegen(context, builder, signature, arguments):
            sums, spare, out, rows, valid = arguments
            neighbours = []
            for panel in range(PAIR):
                place = builder.add(sums, I64(panel * _SLAB * TILE_BYTES))
                for row in range(0, ROWS, 2):
                    first, second = (
                        at(builder, place, I64(number), FLOATS)
                        for number in (row, row + 1)
                    )
                    both = _rounded(builder, first, second, tokens.dtype)
                    neighbours.append(both)
            kind = ir.VectorType(I16, PAIR * ROWS)
            results = [
                builder.bitcast(words, kind) for words in transpose(builder, neighbours)
            ]
            put_rows(builder, results, out, rows, valid, spare)
            return context.get_dummy_value()

        number = types.int64
        return types.void(number, number, number, number, number), codegen

    return finish


def _rounded(builder: Any, first: Any, second: Any, dtype: torch.dtype) -> Any:
    """Two rows' results, as they are stored: for every token a word with both."""
    if dtype == torch.bfloat16:
        both = round_both(builder, first, second)
    else:
        first, second = (from_float(builder, row, dtype) for row in (first, second))
        both = pick_both(builder, first, second, list(range(2 * LANES)))
    order = [token + row * LANES for token in range(LANES) for row in range(2)]
    return builder.bitcast(pick(builder, both, order), WORDS)
