"""LLVM code for products of unsigned codes and signed bytes, by processor."""

import functools
from typing import Any

from llvmlite import binding, ir

from tacq_vllm.kernels.cpu_ir import (
    I8,
    I16,
    I32,
    LANES,
    WORDS,
    call,
    pick,
    pick_both,
    same,
)

BIAS = 16
"""What weights must have added, so that they have no sign."""


def dot_vnni(builder: Any, acc: Any, codes: Any, x: Any) -> Any:
    """Add, in each lane, the products of four unsigned and four signed bytes."""
    name = "llvm.x86.avx512.vpdpbusd.512"
    return call(builder, name, WORDS, [acc, codes, x])


def dot_avx2(builder: Any, acc: Any, codes: Any, x: Any) -> Any:
    """The same in halves; pairs of products fit into 16 bits: 2 · 15 · 127."""
    half_bytes, half_pairs = ir.VectorType(I8, 32), ir.VectorType(I16, 16)
    half_words = ir.VectorType(I32, 8)
    sums = []
    for start in (0, 8):
        parts = [
            builder.bitcast(
                pick(builder, value, list(range(start, start + 8))), half_bytes
            )
            for value in (codes, x)
        ]
        pairs = call(builder, "llvm.x86.avx2.pmadd.ub.sw", half_pairs, parts)
        quads = [pairs, same(half_pairs, 1)]
        sums.append(call(builder, "llvm.x86.avx2.pmadd.wd", half_words, quads))
    return builder.add(acc, pick_both(builder, sums[0], sums[1], list(range(LANES))))


def dot_plain(builder: Any, acc: Any, codes: Any, x: Any) -> Any:
    """The same in instructions that every processor has."""
    for shift in (0, 8, 16, 24):
        low = builder.and_(builder.lshr(codes, _word(shift)), _word(255))
        signed = builder.ashr(builder.shl(x, _word(24 - shift)), _word(24))
        acc = builder.add(acc, builder.mul(low, signed))
    return acc


DOTS = {"avx512vnni": dot_vnni, "avx2": dot_avx2, "plain": dot_plain}


@functools.cache
def best_dot() -> str:
    """The fastest of `DOTS` that this processor has."""
    features = binding.get_host_cpu_features()
    if features.get("avx512vnni") and features.get("avx512bw"):
        return "avx512vnni"
    return "avx2" if features.get("avx2") else "plain"


def _word(number: int) -> Any:
    return same(WORDS, number)
