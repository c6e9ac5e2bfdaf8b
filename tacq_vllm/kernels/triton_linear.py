"""The linear on an NVIDIA GPU, in Triton: `triton_planes` or `triton_clusters`.

Nothing is added across programs by atomics: the same inputs give the same bits.
"""

import torch
from torch import Tensor

from tacq_vllm.format.clustered import ClusteredLinear
from tacq_vllm.format.linear import PackedLinear
from tacq_vllm.kernels.triton_clusters import CLUSTERS_TOKEN_COUNTS, clusters_product
from tacq_vllm.kernels.triton_planes import planes_product, planes_token_counts
from tacq_vllm.kernels.triton_tuning import gpu_class, tuning_for


def supports(linear: PackedLinear | ClusteredLinear, x_dtype: torch.dtype) -> bool:
    """Whether the kernels multiply weights like these with x of a type."""
    return x_dtype in (torch.float32, torch.bfloat16, torch.float16) and all(
        tensor.is_contiguous() for tensor in linear.tensors().values()
    )


def kernel_name(linear: PackedLinear | ClusteredLinear, x_dtype: torch.dtype) -> str:
    """All of them do it, by the number of tokens."""
    return "triton"


def multiply(
    x: Tensor, linear: PackedLinear | ClusteredLinear, bias: Tensor | None
) -> Tensor:
    """Multiply x [..., in] with the weight: [..., out], in the type of x."""
    tokens = x.reshape(-1, linear.in_features).contiguous()
    tuning = tuning_for(gpu_class(x.device))
    with torch.cuda.device_of(x):
        if isinstance(linear, ClusteredLinear):
            out = clusters_product(tokens, linear, bias, tuning)
        else:
            out = planes_product(tokens, linear, bias, tuning)
    return out.view(*x.shape[:-1], linear.out_features)


def warm_up(linear: PackedLinear | ClusteredLinear, x_dtype: torch.dtype) -> None:
    """Compile the kernels for weights like these, so that no request waits for it."""
    if isinstance(linear, ClusteredLinear):
        counts = CLUSTERS_TOKEN_COUNTS
    else:
        counts = planes_token_counts(tuning_for(gpu_class(linear.qweight.device)))
    for tokens in counts:
        x = linear.qweight.new_zeros(tokens, linear.in_features, dtype=x_dtype)
        multiply(x, linear, None)
