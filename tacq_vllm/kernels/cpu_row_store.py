"""LLVM code that stores the results of neighbouring rows of a weight and 16 tokens."""

from typing import Any

from numba.core import cgutils

from tacq_vllm.kernels.cpu_ir import I16, I64, at, put


def put_rows(
    builder: Any, results: list[Any], out: Any, rows: Any, valid: Any, spare: Any
) -> None:
    """Store the results of some rows, as the output has them.

    Args:
        builder: what appends instructions.
        results: of every token, a vector of the rows' results as they are stored.
        out: the address of the first token's first one.
        rows: of the whole weight.
        valid: rows that exist.
        spare: the address of memory for all results.
    """
    kind = results[0].type
    element, count = kind.element, kind.count
    size = 2 if element is I16 else 4
    targets = [
        builder.add(out, builder.mul(rows, I64(size * token)))
        for token in range(len(results))
    ]
    is_whole = builder.icmp_unsigned("==", valid, I64(count))
    with builder.if_else(is_whole) as (then, otherwise):
        with then:
            for target, result in zip(targets, results, strict=True):
                put(builder, target, result)
        with otherwise:
            for token, result in enumerate(results):
                put(builder, builder.add(spare, I64(size * count * token)), result)
            with cgutils.for_range(builder, valid, intp=I64) as row:
                for token, target in enumerate(targets):
                    line = builder.add(spare, I64(size * count * token))
                    value = at(builder, line, row.index, element)
                    offset = builder.mul(row.index, I64(size))
                    put(builder, builder.add(target, offset), value)
