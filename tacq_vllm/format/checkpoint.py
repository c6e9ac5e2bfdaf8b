"""Sharded safetensors files, written as tensors are produced and read lazily."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tacq_vllm.format.json_object import check_keys, read_json
from tacq_vllm.format.schema import FormatError, QuantizationSchema, parse_schema
from tacq_vllm.format.simulated import AnySchema, SimulatedSchema, parse_simulated

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
_SUFFIX = ".safetensors"

_DTYPES = {
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
}


class CheckpointWriter:
    """Writes tensors into shards of bounded size; at most one shard is in memory.

    The shards get their final names, and the index is written, on `close`.
    """

    def __init__(self, folder: Path, max_shard_bytes: int) -> None:
        self._folder = folder
        self._max_shard_bytes = max_shard_bytes
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []
        self._total_bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Queue a tensor of any type and shape; full shards go to disk."""
        if self._pending and self._pending_bytes + tensor.nbytes > (
            self._max_shard_bytes
        ):
            self._flush()
        self._pending[name] = tensor.detach().cpu().contiguous()
        self._pending_bytes += tensor.nbytes
        self._total_bytes += tensor.nbytes

    def close(self) -> None:
        """Write what is pending and give the shards their names."""
        if self._pending:
            self._flush()
        count = len(self._shards)
        if count == 1:
            os.replace(self._temporary(0), self._folder / WEIGHTS_NAME)
            return
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self._shards):
            file_name = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
            os.replace(self._temporary(number), self._folder / file_name)
            weight_map |= dict.fromkeys(names, file_name)
        index = {
            "metadata": {"total_size": self._total_bytes},
            "weight_map": dict(sorted(weight_map.items())),
        }
        (self._folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")

    def _flush(self) -> None:
        path = self._temporary(len(self._shards))
        save_file(self._pending, path, metadata={"format": "pt"})
        path.chmod(0o644)  # safetensors makes it readable by its owner alone
        self._shards.append(list(self._pending))
        self._pending, self._pending_bytes = {}, 0

    def _temporary(self, number: int) -> Path:
        return self._folder / f".shard-{number:05d}.partial"


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies and what its header says."""

    file_name: str
    dtype: torch.dtype | None
    """None: a type that the format does not use."""
    dtype_name: str
    shape: tuple[int, ...]


class CheckpointReader:
    """Lazy access to the tensors of a checkpoint folder.

    Opening reads the headers only.

    Raises:
        FormatError: as `weight_files`; a file is truncated or not safetensors, the
            index contradicts the files, or other weight files lie beside them.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, Any] = {}
        self._tensors: dict[str, StoredTensor] = {}
        self.listing = INDEX_NAME if (folder / INDEX_NAME).is_file() else WEIGHTS_NAME
        """The file that says which tensors there are."""
        names = weight_files(folder)
        self._check_others(names)
        for name in names:
            self._open(name)
        self._check_index()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._files.clear()

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __getitem__(self, name: str) -> StoredTensor:
        return self._tensors[name]

    def load(self, name: str) -> Tensor:
        """Read one tensor."""
        tensor: Tensor = self._files[self._tensors[name].file_name].get_tensor(name)
        return tensor

    @property
    def file_bytes(self) -> int:
        """Bytes of the weight files."""
        return sum((self._folder / name).stat().st_size for name in self._files)

    def _check_others(self, names: list[str]) -> None:
        """Refuse weight files that another reader would take, or take instead."""
        for path in sorted(self._folder.glob(f"*{_SUFFIX}")):
            if path.name not in names:
                raise FormatError(f"{path.name}: a weight file that nothing names")
        if WEIGHTS_NAME in names and len(names) > 1:
            raise FormatError(f"{INDEX_NAME}: {WEIGHTS_NAME} is named beside others")

    def _open(self, file_name: str) -> None:
        path = self._folder / file_name
        try:
            file = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise FormatError(
                f"{file_name}: truncated or not safetensors ({error})"
            ) from error
        # safetensors silently takes one of two tensors of the same name.
        check_keys(read_header(path), file_name)
        self._files[file_name] = file
        for name in file.keys():  # noqa: SIM118 - not a dict
            if name in self._tensors:
                raise FormatError(f"{file_name}: {name} is stored twice")
            entry = file.get_slice(name)
            dtype_name = entry.get_dtype()
            self._tensors[name] = StoredTensor(
                file_name, _DTYPES.get(dtype_name), dtype_name, tuple(entry.get_shape())
            )

    def _check_index(self) -> None:
        if self.listing != INDEX_NAME:
            return
        for name, file_name in _weight_map(self._folder).items():
            if name not in self or self[name].file_name != file_name:
                raise FormatError(f"{INDEX_NAME}: {name} is not in {file_name}")


def weight_files(folder: Path) -> list[str]:
    """The names of a model folder's weight files, all of which are there.

    Raises:
        FormatError: there are none, one is missing, or the index is malformed.
    """
    if (folder / INDEX_NAME).is_file():
        names = sorted(set(_weight_map(folder).values()))
        for name in names:
            if Path(name).name != name or not name.endswith(_SUFFIX):
                raise FormatError(f"{INDEX_NAME}: {name!r} is not a file name")
    elif (folder / WEIGHTS_NAME).is_file():
        names = [WEIGHTS_NAME]
    else:
        raise FormatError(f"{folder}: no {WEIGHTS_NAME} and no {INDEX_NAME}")
    for name in names:
        # Not a pipe or a device, of which the end might never come.
        if not (folder / name).is_file():
            raise FormatError(f"{name}: the file is missing")
    return names


def read_header(path: Path) -> bytes:
    """Read the JSON at the head of a file that safetensors has opened."""
    with path.open("rb") as file:
        return file.read(int.from_bytes(file.read(8), "little"))


def read_schema(folder: Path) -> QuantizationSchema:
    """Read the quantization block of a checkpoint folder.

    Raises:
        FormatError: not a TaCQ checkpoint of this version.
    """
    schema = read_any_schema(folder)
    if isinstance(schema, SimulatedSchema):
        raise FormatError(
            f"{folder}: a simulated checkpoint ({schema.method}): its weights are in "
            "16 bits, with nothing packed in it; only `tacq inspect` knows it"
        )
    return schema


def read_any_schema(folder: Path) -> AnySchema:
    """Read what a folder, packed or simulated, says of itself.

    Raises:
        FormatError: the folder is no TaCQ checkpoint, packed or simulated.
    """
    config = read_json(folder / CONFIG_NAME)
    return parse_simulated(config) or parse_schema(config.get("quantization_config"))


def _weight_map(folder: Path) -> dict[str, str]:
    weight_map = read_json(folder / INDEX_NAME).get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(value, str) for value in weight_map.values())
    ):
        raise FormatError(f"{INDEX_NAME}: no weight_map from names to files")
    return weight_map
