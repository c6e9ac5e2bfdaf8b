"""What the tests of the CPU kernel share."""

import importlib.util
import platform
from collections.abc import Callable

import torch
from torch import Tensor

from tacq_vllm.format.linear import PackedLinear

Linear = Callable[[Tensor, PackedLinear, Tensor | None], Tensor]


def find_obstacle() -> str | None:
    """Why the kernel cannot run here, or None."""
    if platform.machine() != "x86_64" or importlib.util.find_spec("numba") is None:
        return "the kernel needs numba on x86-64"
    from tacq_vllm.kernels.cpu_linear import available

    return None if available() else "PyTorch runs without OpenMP"


OBSTACLE = find_obstacle()


def assert_bits_are_fixed(linear: Linear, x: Tensor, packed: PackedLinear) -> None:
    """Neither the number of threads nor another run changes a bit."""
    results = []

    for threads in (1, 2, 2, 3):
        torch.set_num_threads(threads)
        results.append(linear(x, packed, None))

    assert all(torch.equal(result, results[0]) for result in results)


def assert_tokens_are_apart(linear: Linear, x: Tensor, packed: PackedLinear) -> None:
    """A token's output is the same alone as among the others: x is [tokens, in]."""
    together = linear(x, packed, None)

    alone = torch.cat([linear(row, packed, None) for row in x.split(1)])
    assert torch.equal(together, alone)
