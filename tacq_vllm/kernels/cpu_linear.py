"""The linear on an x86 CPU, compiled by numba, without a C compiler.

Two ways:

* int8, the default for x in 16 bits: x is rounded to 8 bits, with a scale for every 64
  columns (48 beside clusters, fewer where groups are smaller), and multiplied with the
  codes in integers; kept weights are multiplied with x as it is. A processor with AMX
  does that for few tokens only, and multiplies more of them in bfloat16.
* exact, for x in float32 and where the environment has TACQ_CPU_ACTIVATIONS=exact:
  codes become floats in vector registers.

Threads are PyTorch's own. A result is one thread's: the same inputs give the same bits
with any number of threads, except that for many tokens in float32 that is up to
PyTorch's product.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from tacq_vllm.format.clustered import ClusteredLinear
from tacq_vllm.format.linear import PackedLinear
from tacq_vllm.kernels.activations import activations
from tacq_vllm.kernels.cpu_amx import amx_linear, has_amx
from tacq_vllm.kernels.cpu_amx import warm_up as warm_up_amx
from tacq_vllm.kernels.cpu_clusters import clusters_weight
from tacq_vllm.kernels.cpu_dots import best_dot
from tacq_vllm.kernels.cpu_exact import exact_backward, exact_linear
from tacq_vllm.kernels.cpu_exact import warm_up as warm_up_exact
from tacq_vllm.kernels.cpu_int8 import MAX_GEMV_TOKENS, int8_linear
from tacq_vllm.kernels.cpu_int8 import warm_up as warm_up_int8
from tacq_vllm.kernels.cpu_planes import planes_weight
from tacq_vllm.kernels.cpu_rows import CpuWeight
from tacq_vllm.kernels.openmp import find_openmp


def available() -> bool:
    """Whether this process has an OpenMP runtime that the kernels can run in."""
    return find_openmp() is not None


def supports(linear: PackedLinear | ClusteredLinear, x_dtype: torch.dtype) -> bool:
    """Whether the kernels multiply weights like these with x of a type."""
    return (
        x_dtype in (torch.float32, torch.bfloat16, torch.float16)
        and (
            isinstance(linear, ClusteredLinear)
            or (isinstance(linear, PackedLinear) and linear.in_features % 32 == 0)
        )
        and all(map(Tensor.is_contiguous, linear.tensors().values()))
    )


def kernel_name(linear: PackedLinear | ClusteredLinear, x_dtype: torch.dtype) -> str:
    """Which kernel multiplies weights like these with x of a type."""
    if not _rounds(x_dtype):
        return "cpu exact"
    return f"cpu int8 {best_dot()}" + ", bf16 amx" * has_amx()


def arrange(
    linear: PackedLinear | ClusteredLinear, x_dtype: torch.dtype
) -> PackedLinear | ClusteredLinear:
    """The weight itself: the kernels read it as it is stored."""
    return linear


def multiply(
    x: Tensor, linear: PackedLinear | ClusteredLinear, bias: Tensor | None
) -> Tensor:
    """Multiply x [..., in] with the weight: [..., out], in the type of x."""
    weight = _weight(linear)
    is_matrix = x.dim() == 2
    tokens = (x if is_matrix else x.reshape(-1, linear.in_features)).contiguous()
    missing = weight.kind.columns - linear.in_features
    if missing:
        tokens = pad(tokens, (0, missing))
    if not _rounds(x.dtype):
        out = exact_linear(tokens, weight)
    elif has_amx() and tokens.shape[0] > MAX_GEMV_TOKENS:
        out = amx_linear(tokens, weight)
    else:
        out = int8_linear(tokens, weight)
    if not is_matrix:
        out = out.view(*x.shape[:-1], -1)
    return out if bias is None else out + bias


def backward(grad: Tensor, linear: PackedLinear | ClusteredLinear) -> Tensor:
    """The gradient of x for that of the product, [..., out]: [..., in], exact."""
    rows = grad.reshape(-1, linear.out_features)
    out = exact_backward(rows, _weight(linear))[:, : linear.in_features].to(grad.dtype)
    return out.reshape(*grad.shape[:-1], linear.in_features)


def warm_up(
    linear: PackedLinear | ClusteredLinear, x_dtype: torch.dtype, bias: Tensor | None
) -> None:
    """Compile the kernels for weights like these, so that no request waits for it.

    With a bias they are the same as without.
    """
    weight = _weight(linear)
    if _rounds(x_dtype):
        warm_up_int8(weight, x_dtype, few=has_amx())
        if has_amx():
            warm_up_amx(weight, x_dtype)
    else:
        warm_up_exact(weight)


def _weight(linear: PackedLinear | ClusteredLinear) -> CpuWeight:
    """The weight as the kernels take it."""
    if isinstance(linear, ClusteredLinear):
        return clusters_weight(linear)
    return planes_weight(linear)


def _rounds(x_dtype: torch.dtype) -> bool:
    """Whether x is rounded to 8 bits."""
    return x_dtype != torch.float32 and activations() == "int8"
