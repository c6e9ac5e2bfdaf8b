"""The linear on an NVIDIA GPU, in Triton.

| weight | module |
| --- | --- |
| arranged at load, of x in 16 bits | `triton_tiles` |
| planes as they are stored | `triton_planes` |
| clusters as they are stored | `triton_clusters` |

Nothing is added up in the order in which programs end: the same inputs give the same
bits.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from tacq_vllm.format.clustered import ClusteredLinear
from tacq_vllm.format.linear import PackedLinear
from tacq_vllm.kernels.tiles import TiledLinear
from tacq_vllm.kernels.tiling import can_tile, tile
from tacq_vllm.kernels.triton_clusters import (
    clusters_dense,
    clusters_product,
    clusters_token_counts,
)
from tacq_vllm.kernels.triton_dense import DenseParts, dense_backward
from tacq_vllm.kernels.triton_device import major_capability
from tacq_vllm.kernels.triton_planes import (
    planes_dense,
    planes_product,
    planes_token_counts,
)
from tacq_vllm.kernels.triton_tiles import (
    tiles_dense,
    tiles_product,
    tiles_token_counts,
)
from tacq_vllm.kernels.triton_tuning import Tuning, tuning_for

Linear = PackedLinear | ClusteredLinear | TiledLinear

_HALVES = (torch.bfloat16, torch.float16)


def supports(linear: Linear, x_dtype: torch.dtype) -> bool:
    """Whether the kernels multiply weights like these with x of a type."""
    dtypes = (*_HALVES, *(() if isinstance(linear, TiledLinear) else (torch.float32,)))
    return x_dtype in dtypes and all(
        tensor.is_contiguous() for tensor in linear.tensors().values()
    )


def kernel_name(linear: Linear, x_dtype: torch.dtype) -> str:
    """One name for all: the number of tokens decides which kernel runs."""
    return "triton"


def arrange(linear: PackedLinear | ClusteredLinear, x_dtype: torch.dtype) -> Linear:
    """The weight in the order that the kernels are fastest with."""
    return tile(linear) if x_dtype in _HALVES and can_tile(linear) else linear


def multiply(x: Tensor, linear: Linear, bias: Tensor | None) -> Tensor:
    """Multiply x [..., in] with the weight: [..., out], in the type of x."""
    tokens = x.reshape(-1, linear.in_features).contiguous()
    tuning = tuning_for(major_capability(x.device))
    with torch.cuda.device_of(x):
        out = _WAYS[type(linear)].product(tokens, linear, bias, tuning)
    return out.view(*x.shape[:-1], linear.out_features)


def backward(grad: Tensor, linear: Linear) -> Tensor:
    """The gradient of x for that of the product, [..., out]: [..., in]."""
    tuning = tuning_for(major_capability(grad.device))
    weight = _WAYS[type(linear)].dense(linear, grad.dtype, tuning)
    with torch.cuda.device_of(grad):
        out = dense_backward(grad.reshape(-1, linear.out_features), weight)
    return out.view(*grad.shape[:-1], linear.in_features)


def warm_up(linear: Linear, x_dtype: torch.dtype, bias: Tensor | None) -> None:
    """Compile the kernels for weights like these, so that no request waits for it."""
    tuning = tuning_for(major_capability(linear.qweight.device))
    for tokens in _WAYS[type(linear)].token_counts(tuning):
        x = linear.qweight.new_zeros(tokens, linear.in_features, dtype=x_dtype)
        multiply(x, linear, bias)


class _Way(NamedTuple):
    """The kernels for weights in one order."""

    product: Callable[..., Tensor]
    """Of x, the weight, a bias and the tuning."""
    dense: Callable[..., DenseParts]
    """The weight, of a type and the tuning."""
    token_counts: Callable[[Tuning], tuple[int, ...]]
    """Numbers of tokens that between them need every kernel."""


_WAYS: dict[type[Linear], _Way] = {
    ClusteredLinear: _Way(clusters_product, clusters_dense, clusters_token_counts),
    TiledLinear: _Way(tiles_product, tiles_dense, tiles_token_counts),
    PackedLinear: _Way(planes_product, planes_dense, planes_token_counts),
}
