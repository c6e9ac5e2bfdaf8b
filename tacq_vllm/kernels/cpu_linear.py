"""The linear on an x86 CPU, compiled by numba, without a C compiler.

Two ways:

* int8, the default for x in 16 bits: x is rounded to 8 bits, with a scale for every 64
  columns (48 beside clusters, fewer where groups are smaller), and multiplied with the
  codes in integers; kept weights are multiplied with x as it is. A processor with AMX
  does that for few tokens only, and multiplies more of them in bfloat16.
* exact, for x in float32 and where the environment has TACQ_CPU_ACTIVATIONS=exact:
  codes become floats in vector registers. For few tokens they are multiplied into x at
  once; for many, blocks of rows are dequantized into a cache-sized buffer, for the
  matrix product of PyTorch.

Threads are PyTorch's own. A row belongs to one thread: the same inputs give the same
bits with any number of threads, except that for many tokens in float32 that is up to
PyTorch's product.
"""

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear as dense_linear
from torch.nn.functional import pad

from tacq_vllm.format.clustered import ClusteredLinear
from tacq_vllm.format.linear import PackedLinear
from tacq_vllm.kernels.activations import activations
from tacq_vllm.kernels.cpu_amx import amx_linear, has_amx
from tacq_vllm.kernels.cpu_amx import warm_up as warm_up_amx
from tacq_vllm.kernels.cpu_clusters import clusters_weight
from tacq_vllm.kernels.cpu_dots import best_dot
from tacq_vllm.kernels.cpu_exact import compile_dequantize, compile_linear
from tacq_vllm.kernels.cpu_int8 import MAX_GEMV_TOKENS, int8_linear, int8_supports
from tacq_vllm.kernels.cpu_int8 import warm_up as warm_up_int8
from tacq_vllm.kernels.cpu_planes import planes_weight
from tacq_vllm.kernels.cpu_rows import CpuWeight, Rows
from tacq_vllm.kernels.openmp import find_openmp, get_openmp
from tacq_vllm.kernels.reference import BLOCK_WEIGHTS

MAX_FUSED_TOKENS = 8
"""Rows of x up to which the exact kernel multiplies weights in registers."""

_TOKEN_COUNTS = (1, 2, 4, 8)
"""Rows of x for which there are kernels; those between are filled up with zeros."""


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
    weight = _weight(linear)
    if not _rounds(x_dtype, weight):
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
    if _rounds(x.dtype, weight):
        many = has_amx() and tokens.shape[0] > MAX_GEMV_TOKENS
        out = (amx_linear if many else int8_linear)(tokens, weight)
    elif tokens.shape[0] <= MAX_FUSED_TOKENS:
        out = _fused(tokens.to(torch.float32), weight).to(x.dtype)
    else:
        out = _blocked(tokens.to(torch.float32), weight).to(x.dtype)
    if not is_matrix:
        out = out.view(*x.shape[:-1], -1)
    return out if bias is None else out + bias


def backward(grad: Tensor, linear: PackedLinear | ClusteredLinear) -> Tensor:
    """The gradient of x for that of the product, [..., out]: [..., in], exact."""
    weight = _weight(linear)
    rows = grad.reshape(-1, linear.out_features).to(torch.float32)
    total = rows.new_zeros(rows.shape[0], weight.kind.columns)
    for start, stop, block in _blocks(weight):
        total.addmm_(rows[:, start:stop], block)
    out = total[:, : linear.in_features].to(grad.dtype)
    return out.reshape(*grad.shape[:-1], linear.in_features)


def warm_up(
    linear: PackedLinear | ClusteredLinear, x_dtype: torch.dtype, bias: Tensor | None
) -> None:
    """Compile the kernels for weights like these, so that no request waits for it.

    With a bias they are the same as without.
    """
    weight = _weight(linear)
    if _rounds(x_dtype, weight):
        warm_up_int8(weight, x_dtype, few=has_amx())
        if has_amx():
            warm_up_amx(weight, x_dtype)
    else:
        _exact_dequantize(weight.kind.rows)
        for tokens in _TOKEN_COUNTS:
            _exact_linear(weight.kind.rows, tokens)


def _weight(linear: PackedLinear | ClusteredLinear) -> CpuWeight:
    """The weight as the kernels take it."""
    if isinstance(linear, ClusteredLinear):
        return clusters_weight(linear)
    return planes_weight(linear)


def _fused(x: Tensor, weight: CpuWeight) -> Tensor:
    """The exact product, for few tokens: float32 [tokens, out]."""
    kind, tile = weight.kind, _tile(x.shape[0])
    out = torch.empty(tile, kind.out_features)
    kernel = _exact_linear(kind.rows, tile)
    _run_exact(kernel, weight, _with_rows(x, tile), out, 0, kind.out_features)
    return out[: x.shape[0]]


def _blocked(x: Tensor, weight: CpuWeight) -> Tensor:
    """The exact product, for many tokens: float32 [tokens, out]."""
    out = torch.empty(x.shape[0], weight.kind.out_features)
    for start, stop, block in _blocks(weight):
        out[:, start:stop] = dense_linear(x, block)
    return out


def _blocks(weight: CpuWeight) -> Iterator[tuple[int, int, Tensor]]:
    """Blocks of rows: the first, the one after the last, and their weight.

    That is float32 [rows, columns], in the same memory for all.
    """
    kind = weight.kind
    rows = max(1, BLOCK_WEIGHTS // kind.columns)
    block = torch.empty(rows, kind.columns)
    kernel = _exact_dequantize(kind.rows)
    for start in range(0, kind.out_features, rows):
        stop = min(start + rows, kind.out_features)
        _run_exact(kernel, weight, None, block, start, stop)
        yield start, stop, block[: stop - start]


def _run_exact(
    kernel: Any, weight: CpuWeight, x: Tensor | None, out: Tensor, start: int, stop: int
) -> None:
    """Run an exact kernel on rows [start, stop)."""
    kind = weight.kind
    get_openmp().run(
        kernel,
        0 if x is None else x.data_ptr(),
        out.data_ptr(),
        kind.out_features,
        kind.columns,
        kind.groups,
        kind.group_size // kind.rows.step,
        start,
        stop,
        *weight.addresses,
    )


def _tile(count: int) -> int:
    """Tokens that a kernel for `count` of them works on at a time."""
    return next(size for size in _TOKEN_COUNTS if size >= count)


def _with_rows(x: Tensor, count: int) -> Tensor:
    """Append rows of zeros up to `count`."""
    missing = count - x.shape[0]
    return x if missing == 0 else torch.cat((x, x.new_zeros(missing, x.shape[1])))


def _rounds(x_dtype: torch.dtype, weight: CpuWeight) -> bool:
    """Whether x is rounded to 8 bits."""
    return (
        x_dtype != torch.float32 and activations() == "int8" and int8_supports(weight)
    )


@functools.cache
def _exact_linear(rows: Rows, tokens: int) -> Any:
    return compile_linear(rows, tokens, get_openmp().team)


@functools.cache
def _exact_dequantize(rows: Rows) -> Any:
    return compile_dequantize(rows, get_openmp().team)
