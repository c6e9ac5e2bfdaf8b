"""Tensors of finished phases on disk, so that memory does not grow with the model."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor


class WorkDir:
    """One safetensors file per phase and linear, under a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def save(self, phase: str, name: str, tensor: Tensor) -> None:
        """Store a tensor [any shape]."""
        path = self._path(phase, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"tensor": tensor.detach().cpu().contiguous()}, path)

    def load(self, phase: str, name: str) -> Tensor:
        """Read a tensor back, mapped from its file."""
        return load_file(self._path(phase, name))["tensor"]

    def _path(self, phase: str, name: str) -> Path:
        return self._folder / phase / f"{name}.safetensors"


@contextmanager
def open_workdir(folder: Path | None) -> Iterator[WorkDir]:
    """Use `folder`, which stays, or a temporary folder, which goes."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        yield WorkDir(folder)
        return
    temporary = Path(tempfile.mkdtemp(prefix="tacq-"))
    try:
        yield WorkDir(temporary)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
