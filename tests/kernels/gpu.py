"""What the tests of the Triton kernels share."""

from dataclasses import replace
from typing import TypeVar

import pytest
from torch import Tensor

from tacq_vllm.format.clustered import ClusteredLinear
from tacq_vllm.format.linear import PackedLinear
from tacq_vllm.kernels.tiles import TiledLinear
from tests.interpreter import DEVICE

kernel = pytest.importorskip("tacq_vllm.kernels.triton_linear", reason="needs Triton")

Linear = TypeVar("Linear", PackedLinear, ClusteredLinear, TiledLinear)


def to_device(linear: Linear) -> Linear:
    """The linear where the kernels run."""
    return replace(linear, **{n: t.to(DEVICE) for n, t in linear.tensors().items()})


def multiply(x: Tensor, linear: Linear, bias: Tensor | None = None) -> Tensor:
    """Multiply there; the product comes back."""
    linear = to_device(linear)
    assert kernel.supports(linear, x.dtype)
    out: Tensor = kernel.multiply(
        x.to(DEVICE), linear, None if bias is None else bias.to(DEVICE)
    )
    return out.cpu()


def backward(grad: Tensor, linear: Linear) -> Tensor:
    """Compute the gradient of x there; it comes back."""
    linear = to_device(linear)
    assert kernel.supports(linear, grad.dtype)
    out: Tensor = kernel.backward(grad.to(DEVICE), linear)
    return out.cpu()
