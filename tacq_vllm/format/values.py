"""What the values of a linear's tensors must be before a kernel sees them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from tacq_vllm.format.outliers import MAX_WEIGHT, check_outliers
from tacq_vllm.format.stored import Layout, StoredLinear, unpack_outliers


@dataclass(frozen=True)
class LinearFault:
    """What is wrong with the values of one tensor of a linear."""

    tensor: str
    """Last part of its name."""
    reason: str

    def __str__(self) -> str:
        return f"{self.tensor}: {self.reason}"


def check_linear(linear: StoredLinear) -> LinearFault | None:
    """Say what is wrong with the values of a linear's tensors, or None.

    Types and shapes are assumed to be those of `linear_specs`.
    """
    reason = check_scales(linear.scales, linear.layout)
    if reason:
        return LinearFault("scales", reason)
    reason = check_outliers(
        linear.outliers, linear.out_features, linear.in_features, linear.scales.dtype
    )
    return LinearFault("outliers", reason) if reason else None


def check_scales(scales: Tensor, layout: Layout) -> str | None:
    """Say what is wrong with scales, 16-bit [out, groups], or None."""
    if not bool(scales.isfinite().all()):
        return "a value is not finite"
    step = layout.largest_step
    if float(scales.abs().max()) * step >= MAX_WEIGHT:
        return f"{step} times a value is too large to be a weight"
    return None


def check_range(linear: StoredLinear, dtype: torch.dtype) -> LinearFault | None:
    """Say which tensor holds a value that a model's type cannot hold, or None.

    Args:
        linear: its values have passed `check_linear`.
        dtype: the type that the model is loaded in.
    """
    limit = torch.finfo(dtype).max
    if limit >= MAX_WEIGHT:
        return None
    step = linear.layout.largest_step
    remedy = f"does not fit {dtype}: load the model in bfloat16 or float32"
    if float(linear.scales.abs().max()) * step > limit:
        return LinearFault("scales", f"{step} times a value {remedy}")
    values = unpack_outliers(linear).values
    if values.numel() and float(values.abs().max()) > limit:
        return LinearFault("outliers", f"a kept value {remedy}")
    return None
