"""Options that several commands have."""

from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


class InputError(ValueError):
    """Options that do not fit the machine, or each other."""


class DeviceOption(StrEnum):
    """Values of --device."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


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
