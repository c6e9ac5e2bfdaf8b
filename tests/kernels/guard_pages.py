"""Run the CPU kernels on tensors that end, or begin, where memory does.

    python -m tests.kernels.guard_pages exact|int8|amx

A page that nobody may touch lies right after each tensor, or right before it: a kernel
that reads or writes a byte too many ends this program with a fault. What a kernel is
given to write to has NaNs in it, which must not get into the product.
"""

import ctypes
import mmap
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from tacq_vllm.format.clustered import ClusteredLinear
from tacq_vllm.format.linear import PackedLinear
from tests.builders import random_input, random_linear
from tests.clusters import random_clustered

PAGE = mmap.PAGESIZE
PROT_NONE = 0
KEPT: list[mmap.mmap] = []
"""As long as the program runs: what is freed could be mapped again."""

SHAPES = ((1, 32, -1), (33, 96, 32), (70, 160, 16), (64, 256, -1))
TOKENS = (1, 3, 20, 140)
CLUSTER_SHAPES = ((1, 96, -1), (33, 192, 96), (17, 100, -1), (40, 480, -1))
BITS = {"exact": (2, 3, 4), "int8": (3,), "amx": (3,)}
"""Those for int8 and AMX take long to compile; 3 bits have all the tensors."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def guarded(shape: Sequence[int], dtype: torch.dtype, before: bool) -> Tensor:
    """An empty tensor beside a page that must not be touched."""
    nbytes = torch.Size(shape).numel() * dtype.itemsize
    room = -(-max(nbytes, 1) // PAGE) * PAGE
    block = mmap.mmap(-1, room + 2 * PAGE)
    KEPT.append(block)
    whole = torch.frombuffer(block, dtype=torch.uint8)
    for guard in (0, PAGE + room):
        if _libc.mprotect(whole.data_ptr() + guard, PAGE, PROT_NONE):
            raise OSError(ctypes.get_errno(), "mprotect")
    start = PAGE if before else PAGE + room - nbytes
    return whole[start : start + nbytes].view(dtype).view(shape)


def guarded_copy(tensor: Tensor, before: bool) -> Tensor:
    """A copy beside a page that must not be touched."""
    return guarded(tensor.shape, tensor.dtype, before).copy_(tensor)


def linears(way: str) -> Iterator[PackedLinear | ClusteredLinear]:
    """Weights of every kind."""
    for bits in BITS[way]:
        for seed, shape in enumerate(SHAPES):
            packed, _ = random_linear(bits, *shape, 0.1, torch.bfloat16, seed)
            yield packed
    for seed, shape in enumerate(CLUSTER_SHAPES):
        linear, _ = random_clustered(*shape, 0.1, torch.bfloat16, seed)
        yield linear


def main() -> None:
    """Multiply weights of every kind; what is wrong ends the program."""
    (way,) = sys.argv[1:]
    os.environ["TACQ_CPU_ACTIVATIONS"] = "exact" if way == "exact" else "int8"
    from tacq_vllm.kernels.cpu_amx import has_amx

    uses_amx = way == "amx" and has_amx()
    with patch("tacq_vllm.kernels.cpu_linear.has_amx", lambda: uses_amx):
        multiply_all(way)


def multiply_all(way: str) -> None:
    """Multiply weights of every kind."""
    x_dtype = torch.float32 if way == "exact" else torch.bfloat16
    for plain in linears(way):
        for before in (False, True):
            for tokens in TOKENS:
                x = random_input(tokens, plain.in_features, dtype=x_dtype)
                multiply_guarded(x, plain, before)
                print(plain.out_features, plain.in_features, tokens, before, flush=True)


def multiply_guarded(
    x: Tensor, plain: PackedLinear | ClusteredLinear, before: bool
) -> None:
    """Multiply with every tensor guarded, those that the kernel makes too."""
    from tacq_vllm.kernels.cpu_linear import multiply, supports

    assert supports(plain, x.dtype)
    expected = multiply(x, plain, None)
    tensors = {
        name: guarded_copy(tensor, before) for name, tensor in plain.tensors().items()
    }
    packed = replace(plain, **tensors)
    x, real = guarded_copy(x, before), torch.empty

    def empty(*sizes: Any, dtype: torch.dtype = torch.float32) -> Tensor:
        shape = sizes[0] if len(sizes) == 1 and not isinstance(sizes[0], int) else sizes
        made = guarded(shape, dtype, before)
        # As memory that was in use may be; as floats these bytes are NaN.
        made.view(torch.uint8).fill_(0xFF)
        return made

    torch.empty = empty
    try:
        # No memory of an earlier call is used again.
        with patch("tacq_vllm.kernels.cpu_call._held", threading.local()):
            out = multiply(x, packed, None)
    finally:
        torch.empty = real
    assert torch.equal(out, expected)


if __name__ == "__main__":
    main()
