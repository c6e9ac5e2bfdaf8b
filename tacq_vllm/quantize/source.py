"""Models by what a user calls them: a Hub id, a folder, a .gguf file."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from tacq_vllm.format.checkpoint import CONFIG_NAME
from tacq_vllm.quantize.errors import QuantizeError, first_line

_DOWNLOADED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "LICENSE*"]


@dataclass(frozen=True)
class ModelSource:
    """Where a model's files lie."""

    folder: Path
    gguf: str | None = None

    @property
    def arguments(self) -> dict[str, Any]:
        """What Transformers' `from_pretrained` takes."""
        gguf = {"gguf_file": self.gguf} if self.gguf else {}
        return {
            "pretrained_model_name_or_path": str(self.folder),
            # If it is left open, a terminal is asked whether to run a model's code.
            "trust_remote_code": False,
            **gguf,
        }


def model_name(model: str) -> str:
    """What people call a model: a folder's name, a file's stem, a Hub id."""
    path = Path(model)
    if path.suffix == ".gguf":
        return path.stem
    return path.absolute().name if path.is_dir() else model


def locate_model(model: str) -> ModelSource:
    """Find a model's files; those of a Hub id are downloaded.

    Raises:
        QuantizeError: what is here under that name is not a model, or the Hub does
            not have it or is out of reach.
    """
    path = Path(model)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise QuantizeError(f"{model}: no such file")
        return ModelSource(path.absolute().parent, path.name)
    if path.is_dir():
        if not (path / CONFIG_NAME).is_file():
            raise QuantizeError(f"{model}: the folder has no {CONFIG_NAME}")
        return ModelSource(path.absolute())
    if path.is_file():
        raise QuantizeError(f"{model}: give a folder, a Hub id or a .gguf file")
    try:
        return ModelSource(Path(snapshot_download(model, allow_patterns=_DOWNLOADED)))
    except (OSError, ValueError) as error:
        raise QuantizeError(
            f"{model}: no such folder here, and the Hub does not give it: "
            f"{first_line(error)}"
        ) from error


def locate_folder(model: str) -> Path:
    """Find the folder of a model as `locate_model` does.

    Raises:
        QuantizeError: as there, or it is a .gguf file.
    """
    source = locate_model(model)
    if source.gguf is not None:
        raise QuantizeError(f"{model}: a .gguf file; give a folder or a Hub id")
    return source.folder
