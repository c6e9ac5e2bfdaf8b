"""The linear on an x86 CPU, compiled by numba, without a C compiler.

Two ways:

* int8, the default for x in 16 bits: x is rounded to 8 bits, with a scale for every 64
  columns (32 where groups are smaller), and multiplied with the codes in integers; kept
  weights are multiplied with x as it is.
* exact, for x in float32 and where the environment has TACQ_CPU_ACTIVATIONS=exact:
  codes become floats in vector registers. For few tokens they are multiplied into x at
  once; for many, blocks of rows are dequantized into a cache-sized buffer, for the
  matrix product of PyTorch.

Threads are PyTorch's own. A row belongs to one thread: the same inputs give the same
bits with any number of threads, except that for many tokens in float32 that is up to
PyTorch's product.
"""

import functools
import os
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear as dense_linear

from tacq_vllm.format.linear import PackedLinear
from tacq_vllm.kernels.cpu_chunks import supports_groups
from tacq_vllm.kernels.cpu_dots import best_dot
from tacq_vllm.kernels.cpu_exact import compile_dequantize, compile_linear
from tacq_vllm.kernels.cpu_int8 import int8_linear
from tacq_vllm.kernels.cpu_int8 import warm_up as warm_up_int8
from tacq_vllm.kernels.cpu_ir import LANES
from tacq_vllm.kernels.cpu_rows import weight_addresses
from tacq_vllm.kernels.openmp import find_openmp, get_openmp
from tacq_vllm.kernels.reference import BLOCK_WEIGHTS

ACTIVATIONS_VARIABLE = "TACQ_CPU_ACTIVATIONS"

MAX_FUSED_TOKENS = 8
"""Rows of x up to which the exact kernel multiplies weights in registers."""

_TOKEN_COUNTS = (1, 2, 4, 8)
"""Rows of x for which there are kernels; those between are filled up with zeros."""


def available() -> bool:
    """Whether this process has an OpenMP runtime that the kernels can run in."""
    return find_openmp() is not None


def supports(packed: PackedLinear, x_dtype: torch.dtype) -> bool:
    """Whether the kernels multiply weights like these with x of a type."""
    return (
        x_dtype in (torch.float32, torch.bfloat16, torch.float16)
        and packed.in_features % 32 == 0
        and all(tensor.is_contiguous() for tensor in packed.tensors().values())
    )


def kernel_name(packed: PackedLinear, x_dtype: torch.dtype) -> str:
    """Which of them does it."""
    return f"cpu int8 {best_dot()}" if _rounds(x_dtype, packed) else "cpu exact"


def multiply(x: Tensor, packed: PackedLinear, bias: Tensor | None) -> Tensor:
    """Multiply x [..., in] with the weight: [..., out], in the type of x."""
    tokens = x.reshape(-1, packed.in_features).contiguous()
    if _rounds(x.dtype, packed):
        out = int8_linear(tokens, packed)
    elif tokens.shape[0] <= MAX_FUSED_TOKENS:
        out = _fused(tokens.to(torch.float32), packed).to(x.dtype)
    else:
        out = _blocked(tokens.to(torch.float32), packed).to(x.dtype)
    out = out.view(*x.shape[:-1], packed.out_features)
    return out if bias is None else out + bias


def warm_up(packed: PackedLinear, x_dtype: torch.dtype) -> None:
    """Compile the kernels for weights like these, so that no request waits for it."""
    bits, dtype = packed.bits, packed.scales.dtype
    if _rounds(x_dtype, packed):
        warm_up_int8(packed, x_dtype)
    else:
        _exact_dequantize(bits, dtype)
        for tokens in _TOKEN_COUNTS:
            _exact_linear(bits, dtype, tokens)


def _fused(x: Tensor, packed: PackedLinear) -> Tensor:
    """The exact product, for few tokens: float32 [tokens, out]."""
    tile = _tile(x.shape[0])
    out = torch.empty(tile, packed.out_features)
    kernel = _exact_linear(packed.bits, packed.scales.dtype, tile)
    _run_exact(kernel, packed, _with_rows(x, tile), out, 0, packed.out_features)
    return out[: x.shape[0]]


def _blocked(x: Tensor, packed: PackedLinear) -> Tensor:
    """The exact product, for many tokens: float32 [tokens, out]."""
    rows = max(1, BLOCK_WEIGHTS // packed.in_features)
    out = torch.empty(x.shape[0], packed.out_features)
    block = torch.empty(rows, packed.in_features)
    kernel = _exact_dequantize(packed.bits, packed.scales.dtype)
    for start in range(0, packed.out_features, rows):
        stop = min(start + rows, packed.out_features)
        _run_exact(kernel, packed, x, block, start, stop)
        out[:, start:stop] = dense_linear(x, block[: stop - start])
    return out


def _run_exact(
    kernel: Any, packed: PackedLinear, x: Tensor, out: Tensor, start: int, stop: int
) -> None:
    """Run an exact kernel on rows [start, stop)."""
    arguments = (
        *weight_addresses(packed),
        x.data_ptr(),
        out.data_ptr(),
        packed.out_features,
        packed.in_features,
        packed.in_features // packed.group_size,
        packed.group_size // LANES,
        start,
        stop,
    )
    get_openmp().run(kernel, arguments)


def _tile(count: int) -> int:
    """Tokens that a kernel for `count` of them works on at a time."""
    return next(size for size in _TOKEN_COUNTS if size >= count)


def _with_rows(x: Tensor, count: int) -> Tensor:
    """Append rows of zeros up to `count`."""
    missing = count - x.shape[0]
    return x if missing == 0 else torch.cat((x, x.new_zeros(missing, x.shape[1])))


def _rounds(x_dtype: torch.dtype, packed: PackedLinear) -> bool:
    """Whether x is rounded to 8 bits."""
    return (
        x_dtype != torch.float32
        and activations() == "int8"
        and supports_groups(packed.group_size, packed.in_features)
    )


@functools.cache
def activations() -> str:
    """What x in 16 bits becomes: `int8`, or `exact`: it is multiplied as it is."""
    chosen = os.environ.get(ACTIVATIONS_VARIABLE, "int8")
    if chosen not in ("int8", "exact"):
        raise ValueError(f"{ACTIVATIONS_VARIABLE}={chosen}: int8 or exact is expected")
    return chosen


@functools.cache
def _exact_linear(bits: int, dtype: torch.dtype, tokens: int) -> Any:
    return compile_linear(bits, dtype, tokens, get_openmp().team)


@functools.cache
def _exact_dequantize(bits: int, dtype: torch.dtype) -> Any:
    return compile_dequantize(bits, dtype, get_openmp().team)
