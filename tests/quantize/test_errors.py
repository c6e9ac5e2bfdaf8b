"""What is told of an error."""

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tacq_vllm.evaluate.loading import opened
from tacq_vllm.quantize.errors import is_out_of_memory
from tacq_vllm.quantize.model import loading_errors


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (OSError(errno.ENOMEM, "Cannot allocate memory"), True),
        (OSError(errno.ENOSPC, "No space left on device"), False),
        (MemoryError(), True),
        (RuntimeError("CUDA out of memory. Tried to allocate"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("shapes differ"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_is_want_of_memory(error: Exception, is_memory: bool) -> None:
    assert is_out_of_memory(error) is is_memory


@pytest.mark.parametrize(
    "loader", [lambda model: loading_errors(model, Exception), opened]
)
@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("CUDA out of memory", "^CUDA out of memory$"),
        ("shapes differ", "cannot be loaded: RuntimeError: shapes differ$"),
    ],
)
def test_want_of_memory_is_no_fault_of_a_model(
    tiny_model: Path, loader: Callable[[str], Any], words: str, told: str
) -> None:
    with pytest.raises((RuntimeError, ValueError), match=told), loader(str(tiny_model)):
        raise RuntimeError(words)
