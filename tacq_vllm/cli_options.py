"""Options that several commands have."""

import os
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import torch

    from tacq_vllm.config import AnySection

ModelName = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A Hub id, a folder, or a .gguf file.",
        show_default=False,
    ),
]

Output = Annotated[
    Path, typer.Option(help="Folder to make; must not exist or be empty.")
]

WorkDirectory = Annotated[
    Path | None,
    typer.Option(
        "--work-dir",
        help="Where finished phases keep their tensors; it stays. Without it they lie "
        "beside the output until that is whole.",
    ),
]

Calibration = Annotated[
    list[str] | None,
    typer.Option(
        help="wikitext2, c4, mmlu, gsm8k, spider, `self`, or a .jsonl/.txt(.gz) file; "
        "may be repeated."
    ),
]

NumSamples = Annotated[int | None, typer.Option(help="Calibration windows.")]

SeqLen = Annotated[int | None, typer.Option(help="Tokens of a calibration window.")]

DataRoot = Annotated[
    Path | None,
    typer.Option(help="Folder of the named sets' files; without it: the Hub."),
]


class InputError(ValueError):
    """Options that do not fit the machine, or each other."""


class DeviceOption(StrEnum):
    """Values of --device."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


Device = Annotated[
    DeviceOption, typer.Option(help="Where to compute; auto: a GPU if there is one.")
]


def torch_device(option: DeviceOption) -> "torch.device":
    """The device that is meant.

    Raises:
        InputError: this machine has no such device.
    """
    import torch

    available = torch.cuda.is_available()
    if option is DeviceOption.cuda and not available:
        raise InputError("--device cuda, but PyTorch sees no CUDA device")
    use_cuda = available and option is not DeviceOption.cpu
    return torch.device("cuda" if use_cuda else "cpu")


def apply_options(
    recipe: "AnySection", options: Mapping[str, tuple[str, Any]]
) -> "AnySection":
    """Replace fields of a recipe; None leaves as is.

    Args:
        recipe: stays as it is.
        options: an option and its value, by the path of the field that it sets.

    Raises:
        RecipeError: naming the option whose value is out of range.
    """
    from tacq_vllm.config import override_recipe

    return override_recipe(
        recipe,
        {field: value for field, (_, value) in options.items()},
        {field: flag for field, (flag, _) in options.items()},
    )


def check_file(option: str, path: Path | None) -> None:
    """Refuse a file that could not be written when its content is known.

    Raises:
        InputError: naming the option.
    """
    if path is None:
        return
    folder = path.resolve().parent
    if not folder.is_dir():
        raise InputError(f"{option} {path}: there is no such folder")
    if path.is_dir():
        raise InputError(f"{option} {path}: a folder; give a file in it")
    if path.exists() and not path.is_file():
        raise InputError(f"{option} {path}: no plain file; give another")
    if not os.access(folder, os.W_OK):
        raise InputError(f"{option} {path}: nothing can be written there")


def split_names(option: str) -> list[str]:
    """The names of a list with commas, each once."""
    names = (part.strip() for part in option.split(","))
    return list(dict.fromkeys(name for name in names if name))
