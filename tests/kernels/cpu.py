"""What the tests of the CPU kernel share."""

import importlib.util
import platform
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

Linear = Callable[[Tensor, Any, Tensor | None], Tensor]
"""Multiplies with a weight of any layout."""


def find_obstacle() -> str | None:
    """Why the kernel cannot run here, or None."""
    if platform.machine() != "x86_64" or importlib.util.find_spec("numba") is None:
        return "the kernel needs numba on x86-64"
    from tacq_vllm.kernels.cpu_linear import available

    return None if available() else "PyTorch runs without OpenMP"


OBSTACLE = find_obstacle()


def available_dots() -> list[str]:
    """Instructions for products of bytes that this processor has, the best first."""
    from tacq_vllm.kernels.cpu_dots import best_dot

    known = ["avx512vnni", "avx2", "plain"]
    return known[known.index(best_dot()) :]


def use_dot(monkeypatch: pytest.MonkeyPatch, dot: str) -> None:
    """Let the kernels use these instructions."""
    from tacq_vllm.kernels import cpu_int8

    monkeypatch.setattr(cpu_int8, "best_dot", lambda: dot)


def assert_bits_are_fixed(linear: Linear, x: Tensor, packed: Any) -> None:
    """Neither the number of threads nor another run changes a bit."""
    results = []

    for threads in (1, 2, 2, 3):
        torch.set_num_threads(threads)
        results.append(linear(x, packed, None))

    assert all(torch.equal(result, results[0]) for result in results)


def assert_tokens_are_apart(linear: Linear, x: Tensor, packed: Any) -> None:
    """A token's output is the same alone as among the others: x is [tokens, in]."""
    together = linear(x, packed, None)

    alone = torch.cat([linear(row, packed, None) for row in x.split(1)])
    assert torch.equal(together, alone)


def relative_error(out: Tensor, x: Tensor, dense: Tensor) -> float:
    """Error of x times a dense weight, against its size without cancellation."""
    expected = x.double() @ dense.T
    size = (x.double().square() @ dense.square().T).sum().sqrt()
    return float((out.double() - expected).norm() / size.clamp(min=1e-30))
