"""The base model's tensors on disk: safetensors files, read one tensor at a time."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from tacq_vllm.format.checkpoint import read_header, weight_files
from tacq_vllm.format.schema import FormatError
from tacq_vllm.quantize.errors import QuantizeError
from tacq_vllm.quantize.workdir import file_stamp


@dataclass(frozen=True)
class WeightFiles:
    """Tensors by name, each with the file that holds it."""

    folder: Path
    file_of: dict[str, str]
    shapes: dict[str, tuple[int, ...]]

    def __contains__(self, name: str) -> bool:
        return name in self.file_of

    def __iter__(self) -> Iterator[str]:
        return iter(self.file_of)

    def load(self, name: str) -> Tensor:
        """Read one tensor, mapped from its file."""
        with _open(self.folder / self.file_of[name]) as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    def fingerprint(self) -> str:
        """Digest of the files' headers, sizes and times: changes when they do."""
        digest = hashlib.sha256()
        for name in sorted(set(self.file_of.values())):
            path = self.folder / name
            size, time = file_stamp(path)
            digest.update(f"{name} {size} {time}\n".encode())
            digest.update(read_header(path))
        return digest.hexdigest()


def open_weights(folder: Path) -> WeightFiles:
    """Read the headers of a model folder's safetensors files.

    Raises:
        QuantizeError: there are none, or one is missing, truncated or malformed.
    """
    try:
        names = weight_files(folder)
    except FormatError as error:
        raise QuantizeError(f"{folder}: {error}; only safetensors are read") from error
    file_of: dict[str, str] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for name in names:
        with _open(folder / name) as file:
            for key in file.keys():  # noqa: SIM118
                file_of[key] = name
                shapes[key] = tuple(file.get_slice(key).get_shape())
    return WeightFiles(folder, file_of, shapes)


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise QuantizeError(f"{path}: cannot be loaded: {error}") from error
