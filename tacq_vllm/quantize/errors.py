"""What can go wrong while a checkpoint is made."""

import errno

import torch
from pydantic import ValidationError
from torch import Tensor

from tacq_vllm.config import one_line

EXPECTED = (OSError, ValueError, ImportError)
"""What Transformers raises with a message for people when it cannot load a model."""


class QuantizeError(ValueError):
    """Input that cannot be quantized; the message is one line that says what to do."""


def check_finite(values: Tensor, dtype: torch.dtype) -> None:
    """Refuse what a 16-bit type cannot hold.

    Args:
        values: weights in that type, or errors of rounding to it.
        dtype: the type.

    Raises:
        QuantizeError: a value is not finite.
    """
    if not bool(values.isfinite().all()):
        raise QuantizeError(f"a weight or a scale is not finite in {dtype}")


def is_out_of_memory(error: Exception) -> bool:
    """Whether Python, or PyTorch on any device, could not have more memory."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if isinstance(error, RuntimeError):
        words = ("out of memory", "can't allocate memory", "Cannot allocate memory")
        return any(word in str(error) for word in words)
    return isinstance(error, MemoryError)


def first_line(error: Exception) -> str:
    """The first line of an error's message; its type's name where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def loading_reason(error: Exception) -> str:
    """Why a model cannot be loaded, in one line."""
    if isinstance(error, ValidationError):
        return one_line(error)
    words = " ".join(str(error).split())
    if not isinstance(error, EXPECTED):
        return f"{type(error).__name__}: {words}"
    line = first_line(error)
    return words if line.endswith(":") else line
