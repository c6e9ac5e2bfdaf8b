"""What a run keeps on disk, so that memory stays small and a killed run goes on.

A work folder has one folder per phase and fingerprint. The fingerprint is a digest of
just what the phase depends on, written beside its files: the same question finds its
answer, another one gets a folder of its own. A file counts once it has its name; it
gets it when it is whole.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tacq_vllm.format.staging import nearest_existing, staged_file
from tacq_vllm.quantize.errors import QuantizeError
from tacq_vllm.quantize.lock import locked_folder
from tacq_vllm.quantize.world import World

_DEPENDS_NAME = "depends.json"


class PhaseFolder:
    """The files of one phase."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __contains__(self, name: str) -> bool:
        return self._path(name).is_file()

    @property
    def is_empty(self) -> bool:
        """Whether nothing is stored yet."""
        return not any(self.folder.glob("*.safetensors"))

    def save(
        self,
        name: str,
        tensors: Mapping[str, Tensor],
        notes: Mapping[str, str] | None = None,
    ) -> None:
        """Store tensors, and text beside them; whole or not at all."""
        stored = {key: t.detach().cpu().contiguous() for key, t in tensors.items()}
        with staged_file(self._path(name)) as path:
            save_file(stored, path, metadata=dict(notes or {}))

    def load(self, name: str, prefix: str = "") -> dict[str, Tensor]:
        """Read the tensors whose names begin with `prefix`, mapped from their file."""
        with self._open(name) as file:
            keys = [key for key in file.keys() if key.startswith(prefix)]  # noqa: SIM118
            return {key: file.get_tensor(key) for key in keys}

    def load_tensor(self, name: str, key: str) -> Tensor:
        """Read one tensor of a file."""
        with self._open(name) as file:
            tensor: Tensor = file.get_tensor(key)
        return tensor

    def notes(self, name: str) -> dict[str, str]:
        """Read the text that was stored beside tensors."""
        with self._open(name) as file:
            return dict(file.metadata() or {})

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
        self._path(name).unlink(missing_ok=True)

    def sweep(self, prefix: str) -> None:
        """Remove all files named `prefix-…`, whole or not."""
        for path in self.folder.glob(f"{prefix}-*"):
            path.unlink(missing_ok=True)

    def _open(self, name: str) -> Any:
        try:
            return safe_open(self._path(name), framework="pt")
        except (SafetensorError, OSError) as error:
            raise QuantizeError(
                f"{self._path(name)}: {error}; delete {self.folder} to have it "
                "computed anew"
            ) from error

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"


class WorkDir:
    """The folders of all phases."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def phase(self, name: str, depends: Mapping[str, Any]) -> PhaseFolder:
        """The folder of a phase that depends on these JSON values.

        Several processes may open one that is there at the same time: it is only read.
        """
        folder = self.folder / f"{name}-{fingerprint(depends)[:16]}"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / _DEPENDS_NAME
        content = (json.dumps(depends, indent=1) + "\n").encode()
        if not path.is_file() or path.read_bytes() != content:
            with staged_file(path) as staging:
                staging.write_bytes(content)
        return PhaseFolder(folder)

    def differences(self, name: str, depends: Mapping[str, Any]) -> list[str]:
        """What has changed since the earlier run of a phase that differs least.

        Runs that depended on other things, by name, are not compared; without an
        earlier run the list is empty.
        """
        wanted = json.loads(json.dumps(depends))
        earlier = [
            _read_depends(path)
            for path in self.folder.glob(f"{name}-*/{_DEPENDS_NAME}")
        ]
        changes = [
            [
                _difference(key, before[key], wanted[key])
                for key in sorted(wanted)
                if before[key] != wanted[key]
            ]
            for before in earlier
            if before.keys() == wanted.keys()
        ]
        return min((change for change in changes if change), key=len, default=[])


def _read_depends(path: Path) -> dict[str, Any]:
    """What a phase depended on; nothing, of a file that a crash has cut."""
    try:
        depends: dict[str, Any] = json.loads(path.read_bytes())
    except ValueError:
        return {}
    return depends


def _difference(key: str, before: Any, now: Any) -> str:
    readable = all(isinstance(value, int | float) for value in (before, now))
    return f"{key} was {before}, is {now}" if readable else f"{key} changed"


def file_stamp(path: Path) -> tuple[int, int]:
    """Size and time of a file, by which another one of its name is told from it."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def fingerprint(content: Mapping[str, Any]) -> str:
    """Digest of JSON values, whatever the order of their keys."""
    text = json.dumps(content, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


@contextmanager
def open_workdir(folder: Path | None, output: Path, world: World) -> Iterator[WorkDir]:
    """Use `folder`, which stays, or a hidden one beside `output`.

    The hidden one goes when the body has succeeded; the next run with the same output
    finds what a failed one has left, if it has left anything of use. The leading
    process locks the folder for all of its run.

    Raises:
        QuantizeError: another run is at work in it.
    """
    chosen = folder or _hidden_folder(output)
    goes = folder is None and world.leads
    with locked_folder(chosen) if world.leads else nullcontext():
        try:
            yield WorkDir(chosen)
        except BaseException:
            if goes and not any(chosen.rglob("*.safetensors")):
                shutil.rmtree(chosen, ignore_errors=True)
            raise
        world.wait()
        if goes:
            shutil.rmtree(chosen, ignore_errors=True)


def _hidden_folder(output: Path) -> Path:
    """Where a run keeps its phases beside its output."""
    final = output.absolute()
    return final.parent / f".{final.name}.work"


def check_output(output: Path, work_dir: Path | None = None) -> None:
    """Refuse to write over anything, or where a finished folder cannot be put.

    Raises:
        QuantizeError: `output` exists and is not an empty folder; or it is a link, a
            mount point or the current folder, lies in a file, or has `work_dir` inside.
    """
    if work_dir and work_dir.resolve().is_relative_to(output.resolve()):
        raise QuantizeError(f"{output}: --work-dir lies in it; choose one elsewhere")
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        left = _hidden_folder(output)
        # Mostly of one that was killed while it removed it: the output is whole then.
        advice = f"; a stopped run has left {left}: delete it unless that is to go on"
        raise QuantizeError(
            f"{output}: exists already; choose another --output"
            f"{advice if left.is_dir() else ''}"
        )
    above = nearest_existing(output)
    if not above.is_dir():
        raise QuantizeError(f"{output}: {above} is a file; choose another --output")
    fixed = (
        ("the current folder", output.resolve() == Path.cwd()),
        ("a link", output.is_symlink()),
        ("a mount point", output.is_mount()),
    )
    for kind, is_so in fixed:
        if is_so:
            raise QuantizeError(f"{output}: is {kind}; choose another --output")
