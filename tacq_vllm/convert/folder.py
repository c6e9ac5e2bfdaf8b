"""What a checkpoint folder has beside its weights."""

import json
import shutil
from pathlib import Path
from typing import Any

from tacq_vllm.format.checkpoint import (
    CONFIG_NAME,
    CheckpointReader,
    CheckpointWriter,
)
from tacq_vllm.format.schema import QuantizationSchema

MAX_SHARD_BYTES = 4_000_000_000
"""A shard grows no larger, one tensor aside."""

_COMPANIONS = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.jinja",
    "LICENSE*",
)
"""Tokenizer, generation config and licence: never code, weights or another's card."""


def copy_unquantized(
    reader: CheckpointReader, schema: QuantizationSchema, writer: CheckpointWriter
) -> None:
    """Copy all tensors but the packed ones."""
    for name in reader:
        linear, _, suffix = name.rpartition(".")
        if linear not in schema.linears or suffix == "bias":
            writer.add(name, reader.load(name))


def copy_companions(source: Path, folder: Path) -> None:
    """Copy tokenizer, generation config and licence."""
    for pattern in _COMPANIONS:
        for path in source.glob(pattern):
            if path.is_file():
                shutil.copyfile(path, folder / path.name)


def write_config(folder: Path, config: dict[str, Any]) -> None:
    """Write config.json: the last file, without which no folder is a checkpoint."""
    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n")
