"""The good checkpoints, and how to change parts of them."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from tacq_vllm.format.checkpoint import (
    CONFIG_NAME,
    INDEX_NAME,
    WEIGHTS_NAME,
    CheckpointWriter,
)

_DATA = Path(__file__).parents[1] / "data"
GOOD = _DATA / "frozen-v1" / "w3"
CLUSTERED = _DATA / "frozen-v2" / "clusters"
UP = "model.layers.0.mlp.up_proj"
GATE = "model.layers.0.mlp.gate_proj"
DOWN = "model.layers.0.mlp.down_proj"
NORM = "model.norm.weight"
EMBEDDING = "model.embed_tokens.weight"

Json = dict[str, Any]


def shard(folder: Path) -> None:
    """Split the weights into several files with an index."""
    tensors = load_file(folder / WEIGHTS_NAME)
    writer = CheckpointWriter(folder, max_shard_bytes=12_000)
    for name, tensor in tensors.items():
        writer.add(name, tensor.clone())
    (folder / WEIGHTS_NAME).unlink()
    writer.close()


def shards(folder: Path) -> list[Path]:
    """The files of a sharded checkpoint."""
    return sorted(folder.glob("model-*.safetensors"))


def edit_config(change: Callable[[Json], None]) -> Callable[[Path], None]:
    """A change of config.json."""
    return lambda folder: _edit(folder / CONFIG_NAME, change)


def edit_block(change: Callable[[Json], None]) -> Callable[[Path], None]:
    """A change of the quantization block."""
    return edit_config(lambda config: change(config["quantization_config"]))


def edit_index(change: Callable[[Json], None]) -> Callable[[Path], None]:
    """A change of the map from tensors to files."""
    return lambda folder: _edit(
        folder / INDEX_NAME, lambda index: change(index["weight_map"])
    )


def set_config(**fields: Any) -> Callable[[Path], None]:
    """Set fields of config.json."""
    return edit_config(lambda config: config.update(fields))


def set_block(**fields: Any) -> Callable[[Path], None]:
    """Set fields of the quantization block."""
    return edit_block(lambda block: block.update(fields))


def write(name: str, content: str | bytes) -> Callable[[Path], None]:
    """Write a file, over another or not."""
    data = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(data) and None


def replace_text(name: str, old: str, new: str) -> Callable[[Path], None]:
    """Change a text file at one place."""

    def damage(folder: Path) -> None:
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new, 1))

    return damage


def edit_header(change: Callable[[Json], None]) -> Callable[[Path], None]:
    """A change of the header of the weights, whose data stay."""

    def damage(folder: Path) -> None:
        header, data = read_safetensors(folder / WEIGHTS_NAME)
        change(header)
        text = json.dumps(header).encode()
        write_safetensors(folder / WEIGHTS_NAME, text, data)

    return damage


def edit_header_text(change: Callable[[str], str]) -> Callable[[Path], None]:
    """A change of the header of the weights as text."""

    def damage(folder: Path) -> None:
        header, data = read_safetensors(folder / WEIGHTS_NAME)
        text = change(json.dumps(header)).encode()
        write_safetensors(folder / WEIGHTS_NAME, text, data)

    return damage


def read_safetensors(path: Path) -> tuple[Json, bytes]:
    """Header and data of a file."""
    content = path.read_bytes()
    (size,) = struct.unpack_from("<Q", content)
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def write_safetensors(path: Path, header: bytes, data: bytes) -> None:
    """Write a file whose header need not be right."""
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)


def _edit(path: Path, change: Callable[[Json], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
