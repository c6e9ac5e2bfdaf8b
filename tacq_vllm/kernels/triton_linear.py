"""The linear on an NVIDIA GPU, in Triton.

| weight | module |
| --- | --- |
| arranged at load, of x in 16 bits | `triton_tiles` |
| planes as they are stored | `triton_planes` |
| clusters as they are stored | `triton_clusters` |

Nothing is added up in the order in which programs end: the same inputs give the same
bits.
"""

import torch
from torch import Tensor

from tacq_vllm.format.clustered import ClusteredLinear
from tacq_vllm.format.linear import PackedLinear
from tacq_vllm.kernels.tiles import TiledLinear
from tacq_vllm.kernels.tiling import can_tile, tile
from tacq_vllm.kernels.triton_clusters import (
    CLUSTERS_TOKEN_COUNTS,
    clusters_dense,
    clusters_product,
)
from tacq_vllm.kernels.triton_dense import dense_backward
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
from tacq_vllm.kernels.triton_tuning import TUNING

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
    with torch.cuda.device_of(x):
        if isinstance(linear, ClusteredLinear):
            out = clusters_product(tokens, linear, bias, TUNING)
        elif isinstance(linear, TiledLinear):
            out = tiles_product(tokens, linear, bias, TUNING)
        else:
            out = planes_product(tokens, linear, bias, TUNING)
    return out.view(*x.shape[:-1], linear.out_features)


def backward(grad: Tensor, linear: Linear) -> Tensor:
    """The gradient of x for that of the product, [..., out]: [..., in]."""
    dtype = grad.dtype
    if isinstance(linear, ClusteredLinear):
        weight = clusters_dense(linear, dtype, TUNING)
    elif isinstance(linear, TiledLinear):
        weight = tiles_dense(linear, dtype, TUNING)
    else:
        weight = planes_dense(linear, dtype, TUNING)
    with torch.cuda.device_of(grad):
        out = dense_backward(grad.reshape(-1, linear.out_features), weight)
    return out.view(*grad.shape[:-1], linear.in_features)


def warm_up(linear: Linear, x_dtype: torch.dtype, bias: Tensor | None) -> None:
    """Compile the kernels for weights like these, so that no request waits for it."""
    if isinstance(linear, ClusteredLinear):
        counts = CLUSTERS_TOKEN_COUNTS
    elif isinstance(linear, TiledLinear):
        counts = tiles_token_counts(TUNING)
    else:
        counts = planes_token_counts(TUNING)
    for tokens in counts:
        x = linear.qweight.new_zeros(tokens, linear.in_features, dtype=x_dtype)
        multiply(x, linear, bias)
