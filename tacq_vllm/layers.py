"""The quantized linear as a module."""

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

from tacq_vllm.format.stored import Layout, StoredLinear, TensorSpec
from tacq_vllm.kernels.ops import quantized_linear
from tacq_vllm.kernels.reference import dequantize


class TacqLinear(nn.Module):
    """Drop-in for `nn.Linear` whose buffers are the tensors of SPEC.md.

    Args:
        specs: type and shape of each tensor, from `linear_specs`.
        layout: how the codes are stored.
        in_features: columns of the weight.
        bias: an unquantized bias [out], or None.
    """

    qweight: Tensor
    scales: Tensor
    outliers: Tensor

    def __init__(
        self,
        specs: dict[str, TensorSpec],
        layout: Layout,
        in_features: int,
        bias: nn.Parameter | None,
    ) -> None:
        super().__init__()
        self.layout = layout
        self.in_features = in_features
        self.out_features = specs["qweight"].shape[0]
        for name, spec in specs.items():
            self.register_buffer(name, torch.empty(spec.shape, dtype=spec.dtype))
        self.bias = bias

    @property
    def packed(self) -> StoredLinear:
        """The stored tensors."""
        return self.layout.linear(dict(self.named_buffers()), self.in_features)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The dense weight [out, in]."""
        return dequantize(self.packed, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply x [..., in] with the weight: [..., out]."""
        return quantized_linear(x, self, self.layout, self.bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move the tensors, but never convert them, as `model.half()` would.

        The kept weights are bit patterns of the scales' type.
        """
        scales = self.scales
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.scales.dtype != scales.dtype:
            self.scales = scales.to(self.scales.device)
        return self

    def extra_repr(self) -> str:
        """Sizes, as `nn.Linear` shows them."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"layout={self.layout}, bias={self.bias is not None}"
        )
