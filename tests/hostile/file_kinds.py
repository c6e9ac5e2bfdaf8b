"""What can be wrong with the files of the weights, and with their headers."""

import os
import struct
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file, save_file

from tests.builders import truncate
from tests.hostile.good import (
    DOWN,
    EMBEDDING,
    NORM,
    Json,
    edit_header,
    edit_header_text,
    edit_index,
    replace_text,
    shards,
    write,
)
from tests.hostile.kind import BOTH, Kind

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
CUT = (WEIGHTS, "truncated or not safetensors")

Damage = Callable[[Path], None]


def _instead(make: Callable[[Path], object]) -> Damage:
    """Put something else in the place of the weights."""

    def damage(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        make(folder / WEIGHTS)

    return damage


def _pickle(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")


def _append(folder: Path) -> None:
    with (folder / WEIGHTS).open("ab") as file:
        file.write(b"\0" * 64)


def _long_header(folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", 2**63) + content[8:])


def _copy_as(name: str) -> Damage:
    return lambda folder: (
        (folder / name).write_bytes((folder / WEIGHTS).read_bytes()) and None
    )


def _field(tensor: str, **fields: object) -> Damage:
    return edit_header(lambda header: header[tensor].update(fields))


def _twice(text: str) -> str:
    return text.replace(
        "{",
        f'{{"{NORM}": {{"dtype": "BF16", "shape": [64], "data_offsets": [0, 128]}}, ',
        1,
    )


def _overlap(header: Json) -> None:
    header[DOWN + ".qweight"]["data_offsets"] = header[DOWN + ".outliers"][
        "data_offsets"
    ]


def _name(tensor: str, file_name: object) -> Damage:
    return edit_index(lambda names: names.update({tensor: file_name}))


def _lose_shard(folder: Path) -> None:
    shards(folder)[-1].unlink()


def _store_twice(folder: Path) -> None:
    first, *_, last = shards(folder)
    name, tensor = next(iter(load_file(first).items()))
    tensors = {key: value.clone() for key, value in load_file(last).items()}
    save_file(tensors | {name: tensor.clone()}, last, metadata={"format": "pt"})


def _whole_beside_shards(folder: Path) -> None:
    shards(folder)[0].rename(folder / WEIGHTS)
    text = (folder / INDEX).read_text()
    first = "model-00001-of"
    assert first in text
    lines = [
        line.split(": ")[0] + f': "{WEIGHTS}",' if first in line else line
        for line in text.splitlines()
    ]
    (folder / INDEX).write_text("\n".join(lines))


KINDS = [
    Kind("no weights", _instead(lambda p: None), ("no model.safetensors and",), BOTH),
    Kind("a pickle", _pickle, ("no model.safetensors and",)),
    Kind("one byte less", lambda f: truncate(f / WEIGHTS), CUT),
    Kind("half the file", lambda f: truncate(f / WEIGHTS, 15_000), CUT),
    Kind("an empty file", write(WEIGHTS, b""), CUT),
    Kind("a pickle by that name", write(WEIGHTS, b"\x80\x04K\x01." + b"." * 90), CUT),
    Kind("bytes after the end", _append, CUT),
    Kind("a header without end", _long_header, CUT),
    Kind("a header that is not JSON", edit_header_text(lambda text: text[1:]), CUT),
    Kind("a deep header", edit_header_text(lambda text: "[" * 200_000), CUT),
    Kind(
        "a tensor twice",
        edit_header_text(_twice),
        (WEIGHTS, f"'{NORM}' is there twice"),
    ),
    Kind("overlapping tensors", edit_header(_overlap), CUT),
    Kind("a negative place", _field(NORM, data_offsets=[-128, 0]), CUT),
    Kind("a place past the end", _field(NORM, data_offsets=[10**9, 10**9 + 128]), CUT),
    Kind("a huge shape", _field(NORM, shape=[2**40]), CUT),
    Kind("a shape past all integers", _field(NORM, shape=[2**32, 2**32, 2]), CUT),
    Kind("an unknown type", _field(NORM, dtype="I31"), CUT),
    Kind(
        "a folder by that name",
        _instead(lambda path: path.mkdir()),
        ("no model.safetensors and",),
        BOTH,
    ),
    Kind("a pipe", _instead(os.mkfifo), ("no model.safetensors and",), BOTH),
    Kind(
        "a device",
        _instead(lambda path: path.symlink_to("/dev/zero")),
        ("no model.safetensors and",),
        BOTH,
    ),
    Kind(
        "a link to itself",
        _instead(lambda path: path.symlink_to(path)),
        ("no model.safetensors and",),
        BOTH,
    ),
    Kind(
        "another weight file",
        _copy_as("other.safetensors"),
        ("other.safetensors", "a weight file that nothing names"),
    ),
    Kind(
        "a file that vLLM prefers",
        _copy_as("consolidated.safetensors"),
        ("consolidated.safetensors", "a weight file that nothing names"),
    ),
    Kind(
        "a file that Transformers prefers",
        _whole_beside_shards,
        (INDEX, f"{WEIGHTS} is named beside others"),
        is_sharded=True,
    ),
    Kind(
        "an index that is not JSON",
        write(INDEX, "{"),
        (INDEX, "not JSON"),
        ("transformers",),
        is_sharded=True,
    ),
    Kind(
        "an index of nothing",
        write(INDEX, '{"metadata": {}, "weight_map": {}}'),
        (INDEX, "no weight_map"),
        ("transformers",),
        is_sharded=True,
    ),
    Kind(
        "an index of numbers",
        _name(NORM, 3),
        (INDEX, "no weight_map"),
        ("transformers",),
        is_sharded=True,
    ),
    Kind(
        "a tensor twice in the index",
        replace_text(INDEX, '"model.norm', '"model.norm.weight": "x", "model.norm'),
        (INDEX, "'model.norm.weight' is there twice"),
        is_sharded=True,
    ),
    *(
        Kind(
            f"an index that names {name}",
            _name(NORM, name),
            (INDEX, f"'{name}' is not a file name"),
            ("transformers",),
            is_sharded=True,
        )
        for name in ("../model.safetensors", "/etc/passwd", "a/b.safetensors", "x.bin")
    ),
    Kind(
        "a shard less",
        _lose_shard,
        ("model-0000", "the file is missing"),
        ("transformers",),
        is_sharded=True,
    ),
    Kind(
        "a cut shard",
        lambda folder: truncate(shards(folder)[0]),
        ("model-00001-of-", "truncated or not safetensors"),
        is_sharded=True,
    ),
    Kind(
        "the wrong shard",
        _name(EMBEDDING, "model-00001-of-00003.safetensors"),
        (INDEX, f"{EMBEDDING} is not in model-00001"),
        is_sharded=True,
    ),
    Kind(
        "a tensor that no shard has",
        _name("model.extra", "model-00001-of-00003.safetensors"),
        (INDEX, "model.extra is not in model-00001"),
        is_sharded=True,
    ),
    Kind(
        "a tensor in two shards",
        _store_twice,
        ("model-00003-of-00003.safetensors", "is stored twice"),
        is_sharded=True,
    ),
]
