"""The `tacq::` custom ops, one for each layout, and the choice of kernel behind them.

| device | kernel |
| --- | --- |
| x86 CPU, where numba is installed | `cpu_linear`: 8-bit activations, or exact |
| NVIDIA GPU, where Triton is installed | `triton_linear` |
| else | `reference`, in blocks of rows |
"""

import functools
import importlib.util
import platform
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from tacq_vllm.format.clustered import ClusteredLayout, ClusteredLinear
from tacq_vllm.format.linear import PackedLinear, PlanesLayout
from tacq_vllm.format.stored import Layout, StoredLinear
from tacq_vllm.kernels.reference import linear_backward, linear_forward
from tacq_vllm.kernels.tiles import TiledLayout, TiledLinear
from tacq_vllm.kernels.tiling import untile


class Kernels(Protocol):
    """What a module of kernels has for one kind of device and weights of any layout."""

    def supports(self, linear: Any, x_dtype: torch.dtype) -> bool:
        """Whether the kernels multiply weights like these with x of a type."""

    def kernel_name(self, linear: Any, x_dtype: torch.dtype) -> str:
        """Which kernel multiplies weights like these with x of a type."""

    def arrange(self, linear: Any, x_dtype: torch.dtype) -> Any:
        """The weight in the order that the kernels are fastest with."""

    def multiply(self, x: Tensor, linear: Any, bias: Tensor | None) -> Tensor:
        """Multiply x [..., in] with the weight: [..., out], in the type of x."""

    def backward(self, grad: Tensor, linear: Any) -> Tensor:
        """The gradient of x for that of the product, [..., out]: [..., in]."""

    def warm_up(self, linear: Any, x_dtype: torch.dtype, bias: Tensor | None) -> None:
        """Compile what weights like these, x of a type and a bias or none need."""


_LIBRARY = torch.library.Library("tacq", "DEF")


def _empty_product(x: Tensor, codes: Tensor, *rest: Any) -> Tensor:
    """A product's shape, whatever the layout: the fake forward pass of every op."""
    return x.new_empty(*x.shape[:-1], codes.shape[0])


def _register(
    name: str,
    tensors: str,
    numbers: str,
    linear: Callable[..., StoredLinear | TiledLinear],
) -> None:
    """Register the op of a layout, and the op that computes the gradient of x.

    By hand: the wrapper that `custom_op` makes costs microseconds in each of the
    hundreds of calls that a token takes.

    Args:
        name: of the op.
        tensors: those of a linear, as the op's schema declares them.
        numbers: what else it is made of; nothing, or beginning with a comma.
        linear: makes it of its tensors, numbers and `in_features`.
    """
    # Their arguments: x, the tensors, a bias, the numbers.
    bias_at = 1 + len(tensors.split(","))
    backward_name = f"{name}_backward"

    def forward(x: Tensor, *rest: Any) -> Tensor:
        if not x.numel():
            return _empty_product(x, *rest)
        *tensors, bias = rest[:bias_at]
        weight = linear(*tensors, *rest[bias_at:], x.shape[-1])
        kernels = _kernels(x.device.type)
        if kernels is not None and kernels.supports(weight, x.dtype):
            return kernels.multiply(x, weight, bias)
        return linear_forward(x, as_stored(weight), bias)

    def backward(grad: Tensor, *rest: Any) -> Tensor:
        weight = linear(*rest)
        kernels = _kernels(grad.device.type)
        if kernels is not None and kernels.supports(weight, grad.dtype):
            return kernels.backward(grad, weight)
        return linear_backward(grad, as_stored(weight))

    def fake_backward(grad: Tensor, *rest: Any) -> Tensor:
        return grad.new_empty(*grad.shape[:-1], rest[-1])

    def save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:bias_at])
        ctx.numbers = (*inputs[bias_at + 1 :], inputs[0].shape[-1])

    def differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x and of the bias: the packed weight has none."""
        grads: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
        if ctx.needs_input_grad[0]:
            op = getattr(torch.ops.tacq, backward_name)
            grads[0] = op(grad, *ctx.saved_tensors, *ctx.numbers)
        if ctx.needs_input_grad[bias_at]:
            grads[bias_at] = grad.reshape(-1, grad.shape[-1]).sum(0)
        return tuple(grads)

    library, key = _LIBRARY, "CompositeExplicitAutograd"
    library.define(
        f"{name}(Tensor x, {tensors}, Tensor? bias{numbers}) -> Tensor",
        tags=torch.Tag.needs_fixed_stride_order,
    )
    # An operator too, so that what is compiled need not look into it.
    library.define(
        f"{backward_name}(Tensor grad, {tensors}{numbers}, int in_features) -> Tensor"
    )
    library.impl(name, forward, key)
    library.impl(backward_name, backward, key)
    torch.library.register_fake(f"tacq::{name}", _empty_product, lib=library)
    torch.library.register_fake(f"tacq::{backward_name}", fake_backward, lib=library)
    torch.library.register_autograd(
        f"tacq::{name}", differentiate, setup_context=save_for_backward, lib=library
    )


_register(
    "linear",
    "Tensor qweight, Tensor? qweight_high, Tensor scales, Tensor qzeros, "
    "Tensor? qzeros_high, Tensor outliers",
    ", int bits",
    PackedLinear,
)
_register(
    "clustered_linear",
    "Tensor qweight, Tensor scales, Tensor outliers",
    "",
    ClusteredLinear,
)


_register(
    "tiled_linear",
    "Tensor qweight, Tensor grid, Tensor segment_starts, Tensor segment_columns, "
    "Tensor segments, Tensor job_starts, Tensor job_blocks, Tensor counters",
    ", int bits, ScalarType dtype",
    TiledLinear,
)


def quantized_linear(
    x: Tensor, holder: Any, layout: Layout | TiledLayout, bias: Tensor | None
) -> Tensor:
    """Multiply x [..., in] with a packed weight and add a bias: [..., out].

    Args:
        x: activations, float32, bfloat16 or float16.
        holder: has the weight's tensors as attributes; so a module need not make a
            `StoredLinear` of them for every call. They must have passed `check_linear`:
            kernels trust their indices.
        layout: how the codes are stored.
        bias: [out], or None.
    """
    out: Tensor
    if isinstance(layout, ClusteredLayout):
        out = torch.ops.tacq.clustered_linear(
            x, holder.qweight, holder.scales, holder.outliers, bias
        )
        return out
    # A tuple: the compiler of PyTorch 2.9 knows no unions.
    assert isinstance(layout, (PlanesLayout, TiledLayout))
    if isinstance(layout, TiledLayout):
        out = torch.ops.tacq.tiled_linear(
            x,
            holder.qweight,
            holder.grid,
            holder.segment_starts,
            holder.segment_columns,
            holder.segments,
            holder.job_starts,
            holder.job_blocks,
            holder.counters,
            bias,
            layout.bits,
            layout.dtype,
        )
        return out
    has_high = layout.bits == 3
    out = torch.ops.tacq.linear(
        x,
        holder.qweight,
        holder.qweight_high if has_high else None,
        holder.scales,
        holder.qzeros,
        holder.qzeros_high if has_high else None,
        holder.outliers,
        bias,
        layout.bits,
    )
    return out


def as_stored(linear: StoredLinear | TiledLinear) -> StoredLinear:
    """The weight as a checkpoint stores it; `arrange` may have changed its order.

    Clusters that were arranged come back as codes of 3 bits.
    """
    return untile(linear) if isinstance(linear, TiledLinear) else linear


def arrange(packed: StoredLinear, x_dtype: torch.dtype) -> StoredLinear | TiledLinear:
    """The weight in the order that its device is fastest with, for x of a type.

    Where that is another one than it is stored in, tensors that are not in it may be
    dropped.
    """
    kernels = _kernels_for(packed, x_dtype)
    if kernels is None:
        return packed
    arranged: StoredLinear | TiledLinear = kernels.arrange(packed, x_dtype)
    return arranged


def prepare(
    packed: StoredLinear | TiledLinear, x_dtype: torch.dtype, bias: Tensor | None
) -> None:
    """Compile, at load, the kernels that a linear will use for x of a type."""
    kernels = _kernels_for(packed, x_dtype)
    if kernels is not None:
        kernels.warm_up(packed, x_dtype, bias)


def kernel_name(packed: StoredLinear | TiledLinear, x_dtype: torch.dtype) -> str:
    """What will multiply these weights with x of a type, on their device."""
    kernels = _kernels_for(packed, x_dtype)
    return "reference" if kernels is None else kernels.kernel_name(packed, x_dtype)


def _kernels_for(
    packed: StoredLinear | TiledLinear, x_dtype: torch.dtype
) -> Kernels | None:
    kernels = _kernels(packed.tensors()["qweight"].device.type)
    if kernels is None or not kernels.supports(packed, x_dtype):
        return None
    return kernels


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
