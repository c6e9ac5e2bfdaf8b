"""LLVM code of the product of a few panels and tiles of tokens, word by word.

Sums are [tiles, PANELS, TOKENS, ROWS]: a vector has a panel's rows. They lie in memory
while blocks of other columns are unpacked.
"""

from typing import Any

from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from tacq_vllm.kernels.cpu_dots import DOTS
from tacq_vllm.kernels.cpu_ir import (
    F32,
    FLOATS,
    I32,
    I64,
    WORDS,
    add_product,
    at,
    put,
    splat,
    sum_slots,
)
from tacq_vllm.kernels.cpu_panels import PANELS, Panels
from tacq_vllm.kernels.cpu_token_tiles import SUMS_BYTES, TOKENS

PRODUCT_TYPE = types.void(
    types.UniTuple(types.int64, PANELS),
    types.UniTuple(types.int64, 3),
    types.int64,
    types.int64,
    types.int64,
    types.int64,
    types.int64,
)
"""Of an intrinsic that adds the products of some blocks to the sums in memory.

It takes the addresses of the panels; those of the codes, scales and sums of the first
tile, at the first block; the number of blocks of x from a tile to the next; the number
of tokens; the number of blocks; that of the first, as sums are begun if it is 0; and
the address of the sums.
"""

_TOKENS = {"avx512vnni": 4, "avx2": 2, "plain": 2}
"""Tokens whose sums are in registers."""


def dot_product(panels: Panels, dot: str) -> Any:
    """Intrinsic of `PRODUCT_TYPE`; `dot` is a name of `DOTS`."""
    few, words, stride = _TOKENS[dot], panels.words, panels.reader.rows.stride
    pairs = [(panel, token) for panel in range(PANELS) for token in range(few)]

    def add_block(
        builder: Any, lines: list[Any], tile: list[Any], first: Any, totals: list[Any]
    ) -> None:
        """Of a block: `first` is the number of its first token's scale."""
        codes, scales, sums = tile
        numbers = [builder.add(first, I64(token)) for token in range(few)]
        slots = []
        for _, token in pairs:
            slot = cgutils.alloca_once(builder, WORDS)
            begin = at(builder, sums, numbers[token], I32)
            builder.store(splat(builder, begin, WORDS), slot)
            slots.append(slot)
        # A loop, so that the compiler does not load everything first.
        with cgutils.for_range(builder, I64(words // stride), intp=I64) as loop:
            for number in range(stride):
                index = builder.add(builder.mul(loop.index, I64(stride)), I64(number))
                w = [at(builder, line, index, WORDS) for line in lines]
                x = []
                for token in numbers:
                    place = builder.add(builder.mul(token, I64(words)), index)
                    x.append(splat(builder, at(builder, codes, place, I32), WORDS))
                for (panel, token), slot in zip(pairs, slots, strict=True):
                    acc = DOTS[dot](builder, builder.load(slot), w[panel], x[token])
                    builder.store(acc, slot)
        weight_scales = [at(builder, line, I64(words), FLOATS) for line in lines]
        x_scales = [
            splat(builder, at(builder, scales, number, F32), FLOATS)
            for number in numbers
        ]
        for (panel, token), slot, total in zip(pairs, slots, totals, strict=True):
            term = builder.sitofp(builder.load(slot), FLOATS)
            term = builder.fmul(term, x_scales[token])
            add_product(builder, total, weight_scales[panel], term)

    @intrinsic
    def multiply(typing_context, lines, tile, stride, tokens, count, first, sums):
        def codegen(context, builder, signature, arguments):
            lines, tile = (
                cgutils.unpack_tuple(builder, value) for value in arguments[:2]
            )
            stride, tokens, count, first, sums = arguments[2:]
            parts = builder.udiv(builder.add(tokens, I64(few - 1)), I64(few))
            with cgutils.for_range(builder, parts, intp=I64) as part:
                number = builder.udiv(part.index, I64(TOKENS // few))
                token = builder.urem(part.index, I64(TOKENS // few))
                token = builder.mul(token, I64(few))
                start = builder.add(
                    builder.mul(number, I64(PANELS * SUMS_BYTES)),
                    builder.mul(token, I64(64)),
                )
                places = [
                    builder.add(
                        builder.add(sums, start),
                        I64(panel * SUMS_BYTES + 64 * token_number),
                    )
                    for panel, token_number in pairs
                ]
                token = builder.add(
                    builder.mul(builder.mul(number, stride), I64(TOKENS)), token
                )
                totals = sum_slots(builder, places, first)
                with cgutils.for_range(builder, count, intp=I64) as block:
                    offset = builder.mul(block.index, I64(panels.block_bytes))
                    number = builder.add(builder.mul(block.index, I64(TOKENS)), token)
                    add_block(
                        builder,
                        [builder.add(line, offset) for line in lines],
                        tile,
                        number,
                        totals,
                    )
                for place, total in zip(places, totals, strict=True):
                    put(builder, place, builder.load(total))
            return context.get_dummy_value()

        return PRODUCT_TYPE, codegen

    return multiply
