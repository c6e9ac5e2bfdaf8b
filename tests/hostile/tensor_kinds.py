"""What can be wrong with tensors: names, types, shapes, values."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from tests.builders import Change, put, remove, replace, rewrite_tensors
from tests.hostile.good import DOWN, EMBEDDING, GATE, NORM, UP
from tests.hostile.kind import Kind

WEIGHTS = "model.safetensors"
TABLE = f"{UP}.outliers"
SCALES = f"{UP}.scales"
ROWS = 96
"""Of `UP`; its table has an offset more, then the entries."""
NAN, INFINITY, HUGE = 0x7FC0, 0x7F80, 0x7F00
"""Bit patterns of bfloat16."""


def _kind(name: str, change: Change, tensor: str, reason: str) -> Kind:
    def damage(folder: Path) -> None:
        rewrite_tensors(folder, change)

    return Kind(name, damage, (f"{WEIGHTS}: {tensor}", reason))


def _rename(old: str, new: str) -> Change:
    return lambda tensors: tensors.update({new: tensors.pop(old)})


def _swap(one: str, two: str) -> Change:
    return lambda tensors: tensors.update({one: tensors[two], two: tensors[one]})


def _add(name: str, tensor: Tensor) -> Change:
    return lambda tensors: tensors.update({name: tensor})


def _entry(index: int, pattern: int, mask: int) -> Callable[[Tensor], Tensor]:
    """Set bits of an entry of the table."""

    def change(table: Tensor) -> Tensor:
        word = int(table[ROWS + 1 + index]) & 0xFFFFFFFF
        word = (word & ~mask) | (pattern & mask)
        return put(ROWS + 1 + index, word - (word >> 31 << 32))(table)

    return change


def _column(index: int, column: int) -> Change:
    return replace(TABLE, _entry(index, column, 0xFFFF))


def _value(index: int, pattern: int) -> Change:
    return replace(TABLE, _entry(index, pattern << 16, 0xFFFF0000))


def _offset(row: int, offset: int) -> Change:
    return replace(TABLE, put(row, offset))


def _exchange(tensors: dict[str, Tensor]) -> None:
    """Exchange two columns of the first row that keeps two weights."""
    table = tensors[TABLE].clone()
    row = int((table[: ROWS + 1].diff() >= 2).nonzero()[0])
    first = ROWS + 1 + int(table[row])
    table[[first, first + 1]] = table[[first + 1, first]]
    tensors[TABLE] = table


def _repeat(tensors: dict[str, Tensor]) -> None:
    table = tensors[TABLE].clone()
    row = int((table[: ROWS + 1].diff() >= 2).nonzero()[0])
    first = ROWS + 1 + int(table[row])
    table[first + 1] = table[first]
    tensors[TABLE] = table


def _flip_bit(tensors: dict[str, Tensor]) -> None:
    """Set the exponent's bits that a scale of bfloat16 lacks: infinity or NaN."""
    words = tensors[SCALES].clone()
    words.view(torch.int16)[3, 1] |= 0x7F80
    tensors[SCALES] = words


MISSING = "the tensor is missing"

KINDS = [
    *(
        _kind(f"no {name}", remove(f"{UP}.{name}"), f"{UP}.{name}", MISSING)
        for name in ("qweight", "qweight_high", "qzeros", "qzeros_high", "scales")
    ),
    _kind("no table", remove(TABLE), TABLE, MISSING),
    _kind("no norm", remove(NORM), NORM, MISSING),
    _kind("no embedding", remove(EMBEDDING), EMBEDDING, MISSING),
    _kind("renamed codes", _rename(f"{UP}.qweight", f"{UP}.w"), UP, MISSING),
    _kind("renamed norm", _rename(NORM, "model.form.weight"), NORM, MISSING),
    _kind(
        "a dense weight too",
        _add(f"{UP}.weight", torch.zeros(96, 64, dtype=torch.bfloat16)),
        f"{UP}.weight",
        "a 3-bit linear has no such tensor",
    ),
    _kind(
        "an order of columns",
        _add(f"{UP}.g_idx", torch.zeros(64, dtype=torch.int32)),
        f"{UP}.g_idx",
        "a 3-bit linear has no such tensor",
    ),
    _kind(
        "codes of another linear",
        _swap(f"{UP}.qweight", f"{DOWN}.qweight"),
        f"{DOWN}.qweight",
        "is I32 [96, 4], not",
    ),
    _kind(
        "a table of another linear",
        _swap(TABLE, f"{GATE}.outliers"),
        f"{GATE}.outliers",
        "is I32 [156], not",
    ),
    _kind(
        "zero-points for codes",
        _swap(f"{UP}.qweight", f"{UP}.qzeros"),
        f"{UP}.q",
        "not torch.int32",
    ),
    _kind(
        "wide codes",
        replace(f"{UP}.qweight", lambda t: t.to(torch.int64)),
        f"{UP}.qweight",
        "is I64 [96, 4], not",
    ),
    _kind(
        "codes in floats",
        replace(f"{UP}.qweight", lambda t: t.view(torch.float32)),
        f"{UP}.qweight",
        "is F32 [96, 4], not",
    ),
    _kind(
        "transposed codes",
        replace(f"{UP}.qweight", lambda t: t.T.contiguous()),
        f"{UP}.qweight",
        "is I32 [4, 96], not",
    ),
    _kind(
        "flat codes",
        replace(f"{UP}.qweight", lambda t: t.flatten()),
        f"{UP}.qweight",
        "is I32 [384], not",
    ),
    _kind(
        "other scales",
        replace(SCALES, lambda t: t.to(torch.float16)),
        SCALES,
        "is F16 [96, 2], not",
    ),
    _kind(
        "wide scales", replace(SCALES, lambda t: t.float()), SCALES, "is F32 [96, 2]"
    ),
    _kind(
        "fewer scales",
        replace(SCALES, lambda t: t[:, :1].contiguous()),
        SCALES,
        "is BF16 [96, 1], not",
    ),
    _kind(
        "fewer zero-points",
        replace(f"{UP}.qzeros", lambda t: t[1:].contiguous()),
        f"{UP}.qzeros",
        "is I32 [5, 2], not",
    ),
    _kind(
        "a cut table", replace(TABLE, lambda t: t[:-1].clone()), TABLE, "is I32 [155]"
    ),
    _kind(
        "an empty table", replace(TABLE, lambda t: t[:0].clone()), TABLE, "is I32 [0]"
    ),
    _kind("a tall table", replace(TABLE, lambda t: t.unsqueeze(1)), TABLE, "[156, 1]"),
    _kind(
        "a norm in integers",
        replace(NORM, lambda t: t.to(torch.int32)),
        NORM,
        "is I32 [64], not floating point [64]",
    ),
    _kind(
        "a long norm",
        replace(NORM, lambda t: t.repeat(2)),
        NORM,
        "is BF16 [128], not floating point [64]",
    ),
    # Values, which no header shows.
    _kind("a scale NaN", replace(SCALES, put(5, float("nan"))), SCALES, "not finite"),
    _kind("infinite scale", replace(SCALES, put(0, -float("inf"))), SCALES, "not fin"),
    _kind("a flipped bit", _flip_bit, SCALES, "not finite"),
    _kind(
        "a huge scale",
        replace(SCALES, put(7, 3e38)),
        SCALES,
        "7 times a value is too large",
    ),
    _kind("a column too far", _column(58, 64), TABLE, "column 64 is outside 64"),
    _kind("the last column", _column(0, 65535), TABLE, "column 65535 is outside 64"),
    _kind("columns backwards", _exchange, TABLE, "not strictly ascending"),
    _kind("a column twice", _repeat, TABLE, "not strictly ascending"),
    _kind("a late start", _offset(0, 1), TABLE, "row offsets run from 1 to 59, not"),
    _kind("an early start", _offset(0, -1), TABLE, "row offsets run from -1 to 59"),
    _kind("an end too far", _offset(96, 60), TABLE, "row offsets run from 0 to 60"),
    _kind("an early end", _offset(96, 0), TABLE, "row offsets run from 0 to 0, not"),
    _kind("back and forth", _offset(40, 59), TABLE, "row offsets run backwards"),
    _kind("a row past the end", _offset(40, 10**9), TABLE, "row offsets run backwards"),
    _kind("a row before it", _offset(40, -(2**31)), TABLE, "row offsets run backwards"),
    _kind("a kept NaN", _value(3, NAN), TABLE, "a kept value is not finite"),
    _kind("a kept infinity", _value(3, INFINITY), TABLE, "a kept value is not finite"),
    _kind("a kept giant", _value(3, HUGE), TABLE, "too large to be a weight"),
]
