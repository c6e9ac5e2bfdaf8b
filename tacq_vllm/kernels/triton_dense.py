"""The product with a weight that is dequantized in parts, for very many tokens."""

from collections.abc import Callable

from torch import Tensor
from torch.nn.functional import linear as dense_linear

_WORKSPACE_WEIGHTS = 1 << 26
"""Weights dequantized at a time: 128 MiB in 16 bits."""


def dense_product(
    x: Tensor,
    bias: Tensor | None,
    out_features: int,
    multiple: int,
    dequantize: Callable[[int, int], Tensor],
) -> Tensor:
    """Multiply x [tokens, in] with a weight: [tokens, out].

    Args:
        x: rows of activations.
        bias: [out], or None.
        out_features: rows of the weight.
        multiple: where parts of its rows may begin.
        dequantize: gives the dense rows from one on to before another.
    """
    step = max(1, _WORKSPACE_WEIGHTS // (x.shape[1] * multiple)) * multiple
    if out_features <= step:
        return dense_linear(x, dequantize(0, out_features), bias)
    out = x.new_empty(x.shape[0], out_features)
    for start in range(0, out_features, step):
        stop = min(start + step, out_features)
        rows_bias = None if bias is None else bias[start:stop]
        out[:, start:stop] = dense_linear(x, dequantize(start, stop), rows_bias)
    return out
