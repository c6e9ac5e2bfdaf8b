"""SPEC.md read by a stranger: a reader that uses nothing of the package."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

Step = Callable[[int, int], int]


def bfloat16(pattern: int) -> float:
    return struct.unpack("<f", struct.pack("<I", pattern << 16))[0]


def read_tensor(path: Path, name: str) -> tuple[list[int], list[int]]:
    """Shape and unsigned words of a stored tensor, from the raw file."""
    content = path.read_bytes()
    (size,) = struct.unpack_from("<Q", content)
    entry = json.loads(content[8 : 8 + size])[name]
    start, stop = (8 + size + offset for offset in entry["data_offsets"])
    letter = {"I32": "I", "BF16": "H"}[entry["dtype"]]
    width = struct.calcsize(letter)
    words = struct.unpack(f"<{(stop - start) // width}{letter}", content[start:stop])
    return entry["shape"], list(words)


def read_weight(path: Path, name: str, config: dict[str, Any]) -> list[list[float]]:
    """W as SPEC.md defines it, one number at a time."""
    out, in_ = config["linears"][name]
    group = in_ if config["group_size"] == -1 else config["group_size"]
    groups = in_ // group
    is_clustered = config.get("layout") == "clusters"
    step = (clustered_step if is_clustered else plane_step)(path, name, config)
    scales, table = (
        read_tensor(path, f"{name}.{part}")[1] for part in ("scales", "outliers")
    )
    weight = [
        [step(r, k) * bfloat16(scales[r * groups + k // group]) for k in range(in_)]
        for r in range(out)
    ]
    for r in range(out):
        for entry in table[out + 1 + table[r] : out + 1 + table[r + 1]]:
            weight[r][entry & 0xFFFF] += bfloat16(entry >> 16)
    return weight


def plane_step(path: Path, name: str, config: dict[str, Any]) -> Step:
    """What gives code - zero of a row and a column."""
    _, in_ = config["linears"][name]
    bits = config["bits"]
    group = in_ if config["group_size"] == -1 else config["group_size"]
    groups = in_ // group
    width = 4 if bits == 4 else 2
    parts = ["qweight", "qzeros"]
    if bits == 3:
        parts += ["qweight_high", "qzeros_high"]
    tensors = {part: read_tensor(path, f"{name}.{part}") for part in parts}

    def code(row: int, column: int) -> int:
        def field(part: str, width: int) -> int:
            (_, words), values = tensors[part]
            per = 32 // width
            word = values[row * words + column // per]
            return (word >> (width * (column % per))) & (2**width - 1)

        low = field("qweight", width)
        return low + 4 * field("qweight_high", 1) if bits == 3 else low

    def zero(row: int, index: int) -> int:
        def field(part: str, width: int) -> int:
            per = 32 // width
            word = tensors[part][1][row // per * groups + index]
            return (word >> (width * (row % per))) & (2**width - 1)

        low = field("qzeros", width)
        return low + 4 * field("qzeros_high", 1) if bits == 3 else low

    return lambda row, column: code(row, column) - zero(row, column // group)


def clustered_step(path: Path, name: str, config: dict[str, Any]) -> Step:
    """What gives the code of a row and a column."""
    (_, words), values = read_tensor(path, f"{name}.qweight")

    def code(row: int, column: int) -> int:
        first = row * words + 7 * (column // 96)
        block = values[first : first + 7]

        def field(k: int) -> int:
            return (block[k // 16] >> (2 * (k % 16))) & 3

        cluster, place = divmod(column % 96, 3)
        index = (block[6] >> (2 * (cluster // 2))) & 3
        low = field(3 * cluster + place)
        if index == 0:
            return low - 4 * (low >> 1)
        zeroed = index - 1
        if place == zeroed:
            return 0
        others = [other for other in range(3) if other != zeroed]
        high = field(3 * cluster + zeroed) >> others.index(place) & 1
        return low - 4 * high

    return code
