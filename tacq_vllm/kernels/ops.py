"""The `tacq::` custom op and the choice of kernel behind it.

| device | kernel |
| --- | --- |
| x86 CPU, where numba is installed | `cpu_linear`: 8-bit activations, or exact |
| else | `reference`, in blocks of rows |
"""

import functools
import importlib
import importlib.util
import platform
from types import ModuleType

import torch
from torch import Tensor, nn

from tacq_vllm.format.linear import PackedLinear
from tacq_vllm.kernels.reference import linear_forward

_LIBRARY = torch.library.Library("tacq", "DEF")
# Registered by hand: the wrapper that `custom_op` makes costs microseconds in each of
# the hundreds of calls that a token takes.
_LIBRARY.define(
    "linear(Tensor x, Tensor qweight, Tensor? qweight_high, Tensor scales, "
    "Tensor qzeros, Tensor? qzeros_high, Tensor outliers, Tensor? bias, int bits) "
    "-> Tensor",
    tags=torch.Tag.needs_fixed_stride_order,
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
    if x.device.type == "cpu":
        cpu_linear = _cpu_module()
        if cpu_linear is not None and cpu_linear.supports(x, packed):
            result: Tensor = cpu_linear.cpu_linear(x, packed, bias)
            return result
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


torch.library.register_fake("tacq::linear", _fake_linear, lib=_LIBRARY)


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
    if packed.qweight.device.type == "cpu":
        cpu_linear = _cpu_module()
        if cpu_linear is not None:
            cpu_linear.warm_up(packed, x_dtype)


@functools.cache
def _cpu_module() -> ModuleType | None:
    """The numba kernels, which take a second to import, where they can run."""
    if platform.machine() != "x86_64" or importlib.util.find_spec("numba") is None:
        return None
    module = importlib.import_module("tacq_vllm.kernels.cpu_linear")
    return module if module.available() else None
