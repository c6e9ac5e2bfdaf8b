"""The `tacq::` custom op and the choice of kernel behind it.

| device | kernel |
| --- | --- |
| x86 CPU, where numba is installed | `cpu_linear`: 8-bit activations, or exact |
| NVIDIA GPU, where Triton is installed | `triton_linear` |
| else | `reference`, in blocks of rows |
"""

import functools
import importlib.util
import platform
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tacq_vllm.format.linear import PackedLinear
from tacq_vllm.kernels.reference import linear_backward, linear_forward


class Kernels(Protocol):
    """What a module of kernels has for one kind of device."""

    def supports(self, packed: PackedLinear, x_dtype: torch.dtype) -> bool:
        """Whether the kernels multiply weights like these with x of a type."""

    def kernel_name(self, packed: PackedLinear, x_dtype: torch.dtype) -> str:
        """Which of them does it."""

    def multiply(self, x: Tensor, packed: PackedLinear, bias: Tensor | None) -> Tensor:
        """Multiply x [..., in] with the weight: [..., out], in the type of x."""

    def warm_up(self, packed: PackedLinear, x_dtype: torch.dtype) -> None:
        """Compile what weights like these and x of a type need."""


_LIBRARY = torch.library.Library("tacq", "DEF")
# Registered by hand: the wrapper that `custom_op` makes costs microseconds in each of
# the hundreds of calls that a token takes.
_LIBRARY.define(
    "linear(Tensor x, Tensor qweight, Tensor? qweight_high, Tensor scales, "
    "Tensor qzeros, Tensor? qzeros_high, Tensor outliers, Tensor? bias, int bits) "
    "-> Tensor",
    tags=torch.Tag.needs_fixed_stride_order,
)
# An operator too, so that what is compiled need not look into it.
_LIBRARY.define(
    "linear_backward(Tensor grad, Tensor qweight, Tensor? qweight_high, Tensor scales, "
    "Tensor qzeros, Tensor? qzeros_high, Tensor outliers, int bits, int in_features) "
    "-> Tensor"
)


@torch.library.impl(_LIBRARY, "linear", "CompositeExplicitAutograd")
def _linear(
    x: Tensor,
    qweight: Tensor,
    qweight_high: Tensor | None,
    scales: Tensor,
    qzeros: Tensor,
    qzeros_high: Tensor | None,
    outliers: Tensor,
    bias: Tensor | None,
    bits: int,
) -> Tensor:
    packed = PackedLinear(
        qweight=qweight,
        qweight_high=qweight_high,
        scales=scales,
        qzeros=qzeros,
        qzeros_high=qzeros_high,
        outliers=outliers,
        bits=bits,
        in_features=x.shape[-1],
    )
    kernels = _kernels(x.device.type)
    if kernels is not None and x.numel() and kernels.supports(packed, x.dtype):
        return kernels.multiply(x, packed, bias)
    return linear_forward(x, packed, bias)


def _fake_linear(
    x: Tensor,
    qweight: Tensor,
    qweight_high: Tensor | None,
    scales: Tensor,
    qzeros: Tensor,
    qzeros_high: Tensor | None,
    outliers: Tensor,
    bias: Tensor | None,
    bits: int,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], qweight.shape[0])


@torch.library.impl(_LIBRARY, "linear_backward", "CompositeExplicitAutograd")
def _linear_backward(
    grad: Tensor,
    qweight: Tensor,
    qweight_high: Tensor | None,
    scales: Tensor,
    qzeros: Tensor,
    qzeros_high: Tensor | None,
    outliers: Tensor,
    bits: int,
    in_features: int,
) -> Tensor:
    packed = PackedLinear(
        qweight=qweight,
        qweight_high=qweight_high,
        scales=scales,
        qzeros=qzeros,
        qzeros_high=qzeros_high,
        outliers=outliers,
        bits=bits,
        in_features=in_features,
    )
    return linear_backward(grad, packed)


def _fake_linear_backward(
    grad: Tensor,
    qweight: Tensor,
    qweight_high: Tensor | None,
    scales: Tensor,
    qzeros: Tensor,
    qzeros_high: Tensor | None,
    outliers: Tensor,
    bits: int,
    in_features: int,
) -> Tensor:
    return grad.new_empty(*grad.shape[:-1], in_features)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, *stored, _, bits = inputs
    ctx.save_for_backward(*stored)
    ctx.bits, ctx.in_features = bits, x.shape[-1]


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of x and of the bias: the packed weight has none."""
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = torch.ops.tacq.linear_backward(
            grad, *ctx.saved_tensors, ctx.bits, ctx.in_features
        )
    if ctx.needs_input_grad[7]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
    return (grad_x, *(None,) * 6, grad_bias, None)


torch.library.register_fake("tacq::linear", _fake_linear, lib=_LIBRARY)
torch.library.register_fake(
    "tacq::linear_backward", _fake_linear_backward, lib=_LIBRARY
)
torch.library.register_autograd(
    "tacq::linear", _differentiate, setup_context=_save_for_backward, lib=_LIBRARY
)


def quantized_linear(x: Tensor, packed: PackedLinear, bias: Tensor | None) -> Tensor:
    """Multiply x [..., in] with a packed weight and add `bias` [out]: [..., out].

    The tensors must have passed `check_linear`: kernels trust their indices.
    """
    return stored_linear(x, packed, packed.bits, bias)


def stored_linear(
    x: Tensor, holder: PackedLinear | nn.Module, bits: int, bias: Tensor | None
) -> Tensor:
    """`quantized_linear` with the tensors that something holds by their names.

    A module need not make a `PackedLinear` of them for every call.
    """
    has_high = bits == 3
    out: Tensor = torch.ops.tacq.linear(
        x,
        holder.qweight,
        holder.qweight_high if has_high else None,
        holder.scales,
        holder.qzeros,
        holder.qzeros_high if has_high else None,
        holder.outliers,
        bias,
        bits,
    )
    return out


def prepare(packed: PackedLinear, x_dtype: torch.dtype) -> None:
    """Compile, at load, the kernels that a linear will use for x of a type."""
    kernels = _kernels(packed.qweight.device.type)
    if kernels is not None:
        kernels.warm_up(packed, x_dtype)


def kernel_name(packed: PackedLinear, x_dtype: torch.dtype) -> str:
    """What will multiply these weights with x of a type, on their device."""
    kernels = _kernels(packed.qweight.device.type)
    if kernels is None or not kernels.supports(packed, x_dtype):
        return "reference"
    return kernels.kernel_name(packed, x_dtype)


@functools.cache
def _kernels(device_type: str) -> Kernels | None:
    """The kernels of a kind of device, where they can run; they are slow to import."""
    if device_type == "cpu" and platform.machine() == "x86_64" and _installed("numba"):
        from tacq_vllm.kernels import cpu_linear

        return cpu_linear if cpu_linear.available() else None
    if device_type == "cuda" and torch.version.cuda and _installed("triton"):
        from tacq_vllm.kernels import triton_linear

        return triton_linear
    return None


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
