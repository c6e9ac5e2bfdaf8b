"""Triton's interpreter, which runs the GPU kernels where there is no GPU."""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
"""Where the Triton kernels run."""


def interpret_triton() -> None:
    """Import Triton and the kernels so that they can be run `interpreted`."""
    if DEVICE.type == "cuda" or importlib.util.find_spec("triton") is None:
        return
    with interpreted():
        from tacq_vllm.kernels import triton_linear  # noqa: F401
    _mend_products()


@contextmanager
def interpreted() -> Iterator[None]:
    """Where Triton is imported, kernels are defined and run for the interpreter."""
    with pytest.MonkeyPatch.context() as patch:
        if DEVICE.type == "cpu":
            patch.setenv("TRITON_INTERPRET", "1")
        yield


def _mend_products() -> None:
    """Let the interpreter multiply matrices of bfloat16, and run our assembly.

    It keeps them as the 16-bit integers that have their bit patterns, and multiplies
    those; assembly it refuses.
    """
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    original = InterpreterBuilder.create_dot

    def as_float(operand: Any) -> Any:
        if operand.dtype.scalar != tl.bfloat16:
            return operand
        bits = operand.data.astype(np.uint32) << 16
        return TensorHandle(bits.view(np.float32), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return original(self, as_float(a), as_float(b), *rest)

    InterpreterBuilder.create_dot = create_dot
    InterpreterBuilder.create_inline_asm = _run_assembly


class _Results(list[Any]):
    """What an instruction gives."""

    get_result = list.__getitem__


def _run_assembly(
    builder: Any, asm: str, constraints: str, values: list[Any], *rest: Any
) -> _Results:
    """What kernels have in PTX.

    That is a · b + c of halves of words, `in_register`, and `high_pairs`.
    """
    from triton.runtime.interpreter import TensorHandle

    if "%smid" in asm:
        return _Results(values)
    words = [torch.tensor(value.data).view(torch.int32) for value in values]
    if asm == "prmt.b32 $0, $1, $2, 0x7632;":
        first, second = words
        result = first >> 16 & 0xFFFF | second & -0x10000
    else:
        name = asm.split()[0]
        dtype = {"fma.rn.bf16x2": torch.bfloat16, "fma.rn.f16x2": torch.float16}[name]
        a, b, c = (pair.view(dtype).double() for pair in words)
        result = (a * b + c).to(dtype).view(torch.int32)
    return _Results([TensorHandle(result.numpy(), values[0].dtype)])
