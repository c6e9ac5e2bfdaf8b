"""Products with a weight that is dequantized in parts, for very many tokens."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear as dense_linear

_WORKSPACE_WEIGHTS = 1 << 26
"""Weights dequantized at a time: 128 MiB in 16 bits."""


@dataclass(frozen=True)
class DenseParts:
    """A weight `[out, in]` that is never dense as a whole, if it is large."""

    out_features: int
    in_features: int
    multiple: int
    """Where parts of its rows may begin."""
    dequantize: Callable[[int, int], Tensor]
    """Gives the dense rows from one on to before another: [rows, in]."""

    def parts(self) -> Iterator[tuple[int, int]]:
        """The first row of each part, and the one after its last."""
        multiple = self.multiple
        step = max(1, _WORKSPACE_WEIGHTS // (self.in_features * multiple)) * multiple
        for start in range(0, self.out_features, step):
            yield start, min(start + step, self.out_features)


def dense_product(x: Tensor, weight: DenseParts, bias: Tensor | None) -> Tensor:
    """Multiply x [tokens, in] with the weight and add a bias: [tokens, out]."""
    parts = list(weight.parts())
    if len(parts) == 1:
        return dense_linear(x, weight.dequantize(*parts[0]), bias)
    out = x.new_empty(x.shape[0], weight.out_features)
    for start, stop in parts:
        rows_bias = None if bias is None else bias[start:stop]
        out[:, start:stop] = dense_linear(x, weight.dequantize(start, stop), rows_bias)
    return out


def dense_backward(grad: Tensor, weight: DenseParts) -> Tensor:
    """The gradient of x for that of the product, [tokens, out]: [tokens, in]."""
    parts = list(weight.parts())
    if len(parts) == 1:
        return grad @ weight.dequantize(*parts[0])
    total = grad.new_zeros(grad.shape[0], weight.in_features, dtype=torch.float32)
    for start, stop in parts:
        total += grad[:, start:stop] @ weight.dequantize(start, stop)
    return total.to(grad.dtype)
