"""The quantized linear as a module."""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from tacq_vllm.format.linear import PlanesLayout
from tacq_vllm.format.stored import Layout, StoredLinear, TensorSpec
from tacq_vllm.kernels.ops import arrange, as_stored, quantized_linear
from tacq_vllm.kernels.reference import dequantize
from tacq_vllm.kernels.tiles import TiledLayout, TiledLinear


class TacqLinear(nn.Module):
    """Drop-in for `nn.Linear` whose state is the tensors of SPEC.md.

    They are its buffers too, until `arrange` puts others in their place.

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
        self.layout: Layout | TiledLayout = layout
        self.in_features = in_features
        self.out_features = specs["qweight"].shape[0]
        for name, spec in specs.items():
            self.register_buffer(name, torch.empty(spec.shape, dtype=spec.dtype))
        self.bias = bias
        self._x_dtype: torch.dtype | None = None
        """What the weight is to be arranged for, wherever it is moved."""

    @property
    def held(self) -> StoredLinear | TiledLinear:
        """The weight as it is in memory."""
        return self.layout.linear(dict(self.named_buffers()), self.in_features)

    @property
    def packed(self) -> StoredLinear:
        """The weight as it is stored."""
        return as_stored(self.held)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The dense weight [out, in]."""
        return dequantize(self.packed, dtype)

    def arrange(self, x_dtype: torch.dtype) -> None:
        """Hold the weight in the order that its device is fastest with.

        The state dict stays what it is, and the module may be moved and converted. Not
        so clusters, which cannot be stored again as they were.

        Args:
            x_dtype: the type that x will mostly have; others are still taken.
        """
        self._x_dtype = x_dtype
        packed = self.packed
        if isinstance(packed.layout, PlanesLayout):
            self._hold(arrange(packed, x_dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Multiply x [..., in] with the weight: [..., out]."""
        if isinstance(self.layout, TiledLayout) and x.dtype.itemsize != 2:
            # Of autocast, say; in that order it cannot be multiplied.
            self._hold(self.packed)
        return quantized_linear(x, self, self.layout, self.bias)

    def extra_repr(self) -> str:
        """Sizes, as `nn.Linear` shows them."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"layout={self.layout}, bias={self.bias is not None}"
        )

    def _hold(self, weight: StoredLinear | TiledLinear) -> None:
        """Replace the buffers by the tensors of the weight in another order."""
        if weight.layout == self.layout:
            return
        is_stored = not isinstance(weight, TiledLinear)
        self._buffers.clear()
        for name, tensor in weight.tensors().items():
            self.register_buffer(name, tensor, persistent=is_stored)
        self.layout = weight.layout

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move the tensors, but never convert them, as `model.half()` would.

        The kept weights are bit patterns of the scales' type.
        """
        self._hold(self.packed)
        scales = self.scales
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.scales.dtype != scales.dtype:
            self.scales = scales.to(self.scales.device)
        if self._x_dtype is not None:
            # What `fn` makes of the model it makes of x.
            x = torch.empty(0, dtype=self._x_dtype, device=scales.device)
            self.arrange(fn(x).dtype)
        return self

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if isinstance(self.layout, TiledLayout):
            for name, tensor in self.packed.tensors().items():
                destination[prefix + name] = tensor

    def _load_from_state_dict(self, *arguments: Any) -> None:
        self._hold(self.packed)
        super()._load_from_state_dict(*arguments)
        if self._x_dtype is not None:
            self.arrange(self._x_dtype)
