"""What the kernels have to know of a GPU."""

import functools

import torch


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many a GPU has; in the interpreter, a number that divides little."""
    if device.type != "cuda":
        return 3
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def major_capability(device: torch.device) -> int:
    """The major compute capability of a GPU; 0 in the interpreter."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0
