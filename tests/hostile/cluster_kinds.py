"""What can be wrong with a checkpoint of clusters alone."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from tests.builders import Change, put, remove, replace, rewrite_tensors
from tests.hostile.good import CLUSTERED, UP, edit_block, set_block
from tests.hostile.kind import Kind

WEIGHTS = "model.safetensors"
CODES, SCALES, TABLE = (f"{UP}.{part}" for part in ("qweight", "scales", "outliers"))


def _block(name: str, damage: Callable[[Path], None], reason: str) -> Kind:
    return Kind(name, damage, (reason,), source=CLUSTERED)


def _tensor(name: str, change: Change, tensor: str, reason: str) -> Kind:
    def damage(folder: Path) -> None:
        rewrite_tensors(folder, change)

    parts = (f"{WEIGHTS}: {tensor}", reason)
    return Kind(name, damage, parts, source=CLUSTERED)


def _add_zeros(tensors: dict[str, Tensor]) -> None:
    tensors[f"{UP}.qzeros"] = torch.zeros(6, 1, dtype=torch.int32)


KINDS = [
    _block(
        "clusters in version 1",
        set_block(format_version=1),
        "layout clusters: not that of format_version 1",
    ),
    _block(
        "version 2 without a layout",
        edit_block(lambda block: block.pop("layout")),
        "layout planes: not that of format_version 2",
    ),
    _block("an unknown layout", set_block(layout="spirals"), "layout: Input should be"),
    _block("clusters of 3 bits", set_block(bits=3), "bits 3: clusters have 2"),
    _block(
        "a group that cuts a block",
        set_block(group_size=32),
        "group_size 32: not -1 or 96, 192",
    ),
    _block(
        "a block larger than a row",
        set_block(group_size=96),
        "group_size 96 does not divide its 64",
    ),
    _tensor("no clusters", remove(CODES), CODES, "the tensor is missing"),
    _tensor(
        "zero-points of clusters",
        _add_zeros,
        f"{UP}.qzeros",
        "a clustered linear has no such tensor",
    ),
    _tensor(
        "clusters without indices",
        replace(CODES, lambda t: t[:, :6].contiguous()),
        CODES,
        "is I32 [96, 6], not torch.int32 [96, 7]",
    ),
    _tensor(
        "clusters in floats",
        replace(CODES, lambda t: t.view(torch.float32)),
        CODES,
        "is F32 [96, 7], not",
    ),
    _tensor(
        "a scale of clusters NaN",
        replace(SCALES, put(5, float("nan"))),
        SCALES,
        "a value is not finite",
    ),
    _tensor(
        "a huge scale of clusters",
        replace(SCALES, put(7, -1e38)),
        SCALES,
        "4 times a value is too large to be a weight",
    ),
    _tensor(
        "a weight kept in the padding",
        replace(TABLE, put(96 + 1, 64)),
        TABLE,
        "column 64 is outside 64",
    ),
]
