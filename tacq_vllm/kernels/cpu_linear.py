"""The linear on an x86 CPU, compiled by numba, without a C compiler.

Two ways:

* int8, the default for x in 16 bits: x is rounded to 8 bits, with a scale for every 32
  columns, and multiplied with the codes in integers; kept weights are multiplied with x
  as it is.
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
from tacq_vllm.kernels.cpu_chunks import lane_columns, supports_groups
from tacq_vllm.kernels.cpu_dots import best_dot
from tacq_vllm.kernels.cpu_exact import compile_dequantize, compile_linear
from tacq_vllm.kernels.cpu_int8_gemm import OFFSET, OUT_TILE, TILE, compile_gemm
from tacq_vllm.kernels.cpu_int8_gemv import SPAN as GEMV_SPAN
from tacq_vllm.kernels.cpu_int8_gemv import compile_gemv
from tacq_vllm.kernels.cpu_ir import LANES
from tacq_vllm.kernels.cpu_rounding import block_columns, compile_rounding
from tacq_vllm.kernels.openmp import OpenMP, find_openmp
from tacq_vllm.kernels.reference import BLOCK_WEIGHTS

ACTIVATIONS_VARIABLE = "TACQ_CPU_ACTIVATIONS"

MAX_FUSED_TOKENS = 8
"""Rows of x up to which the exact kernel multiplies weights in registers."""

MAX_GEMV_TOKENS = 4
"""Rows of x up to which the int8 kernel does."""

_TOKEN_COUNTS = (1, 2, 4, 8)
"""Rows of x for which there are kernels; those between are filled up with zeros."""


def available() -> bool:
    """Whether this process has an OpenMP runtime that the kernels can run in."""
    return find_openmp() is not None


def supports(x: Tensor, packed: PackedLinear) -> bool:
    """Whether the kernels serve these tensors."""
    return (
        x.device.type == "cpu"
        and x.numel() > 0
        and x.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and packed.in_features % 32 == 0
        and all(tensor.is_contiguous() for tensor in packed.tensors().values())
    )


def cpu_linear(x: Tensor, packed: PackedLinear, bias: Tensor | None) -> Tensor:
    """Multiply x [..., in] with the weight: [..., out], in the type of x."""
    tokens = x.reshape(-1, packed.in_features).to(torch.float32).contiguous()
    if _rounds(x.dtype, packed):
        out = _rounded(tokens, packed)
    elif tokens.shape[0] <= MAX_FUSED_TOKENS:
        out = _fused(tokens, packed)
    else:
        out = _blocked(tokens, packed)
    result = out.to(x.dtype).view(*x.shape[:-1], packed.out_features)
    return result if bias is None else result + bias


def warm_up(packed: PackedLinear, x_dtype: torch.dtype) -> None:
    """Compile the kernels for weights like these, so that no request waits for it."""
    bits, dtype = packed.bits, packed.scales.dtype
    if _rounds(x_dtype, packed):
        span = lane_columns(packed.group_size, packed.in_features)
        _rounding(0, GEMV_SPAN, block_columns(span))
        _rounding(OFFSET, span, block_columns(span))
        _gemm(*_kind(packed), span)
        for tokens in _TOKEN_COUNTS:
            if tokens <= MAX_GEMV_TOKENS:
                _gemv(*_kind(packed), tokens)
    else:
        _exact_dequantize(bits, dtype)
        for tokens in _TOKEN_COUNTS:
            _exact_linear(bits, dtype, tokens)


def _rounded(x: Tensor, packed: PackedLinear) -> Tensor:
    """The product with x in 8 bits: float32 [tokens, out]."""
    few = x.shape[0] <= MAX_GEMV_TOKENS
    return (_few_rounded if few else _many_rounded)(x, packed)


def _few_rounded(x: Tensor, packed: PackedLinear) -> Tensor:
    """The product with few rows of x in 8 bits: float32 [tokens, out]."""
    tile = _tile(x.shape[0])
    padded = _with_rows(x, tile)
    codes, scales, sums = _round(padded, packed, GEMV_SPAN, tile, 0)
    columns_first = padded.T.contiguous()
    out = torch.empty(tile, packed.out_features)
    _openmp().run(
        _gemv(*_kind(packed), tile),
        (
            *_addresses(packed),
            columns_first.data_ptr(),
            codes.data_ptr(),
            scales.data_ptr(),
            sums.data_ptr(),
            out.data_ptr(),
            *_sizes(packed, codes.shape[1]),
        ),
    )
    return out[: x.shape[0]]


def _many_rounded(x: Tensor, packed: PackedLinear) -> Tensor:
    """The product with many rows of x in 8 bits: float32 [tokens, out]."""
    count, columns = x.shape
    span = lane_columns(packed.group_size, columns)
    padded = _with_rows(x, -(-count // OUT_TILE) * OUT_TILE)
    tokens = -(-count // TILE) * TILE
    codes, scales, _ = _round(padded[:tokens], packed, span, TILE, OFFSET)
    tiles = padded.view(-1, OUT_TILE, columns).transpose(1, 2).contiguous()
    out = torch.empty(padded.shape[0], packed.out_features)
    _openmp().run(
        _gemm(*_kind(packed), span),
        (
            *_addresses(packed),
            tiles.data_ptr(),
            codes.data_ptr(),
            scales.data_ptr(),
            out.data_ptr(),
            tokens,
            *_sizes(packed, codes.shape[1]),
        ),
    )
    return out[:count]


def _round(
    x: Tensor, packed: PackedLinear, span: int, tile: int, offset: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Round x to 8 bits: codes, scales and sums, a row for each token and chunk."""
    tokens, columns = x.shape
    shape = tokens, -(-columns // (LANES * span))
    codes = torch.empty(*shape, LANES * span, dtype=torch.int8)
    # What lies behind the last column has the scale 0.
    whole = columns % (LANES * span) == 0
    scales = (torch.empty if whole else torch.zeros)(*shape, LANES)
    sums = torch.empty(*shape, LANES, dtype=torch.int32)
    block = block_columns(lane_columns(packed.group_size, columns))
    _openmp().run(
        _rounding(offset, span, block),
        (
            x.data_ptr(),
            codes.data_ptr(),
            scales.data_ptr(),
            sums.data_ptr(),
            columns,
            shape[1],
            tile,
            0,
            tokens,
        ),
    )
    return codes, scales, sums


def _sizes(packed: PackedLinear, chunks: int) -> tuple[int, ...]:
    """What the int8 kernels are told of the weight's shape."""
    rows, columns = packed.out_features, packed.in_features
    return columns, chunks, columns // packed.group_size, rows, 0, rows


def _kind(packed: PackedLinear) -> tuple[int, torch.dtype, int, str]:
    """What the int8 kernels are compiled for; a group of 0 columns is the row."""
    whole = packed.group_size == packed.in_features
    group_size = 0 if whole else packed.group_size
    return packed.bits, packed.scales.dtype, group_size, best_dot()


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
        *_addresses(packed),
        x.data_ptr(),
        out.data_ptr(),
        packed.out_features,
        packed.in_features,
        packed.in_features // packed.group_size,
        packed.group_size // LANES,
        start,
        stop,
    )
    _openmp().run(kernel, arguments)


def _addresses(packed: PackedLinear) -> tuple[int, ...]:
    """Where the packed tensors lie, in the order in which kernels take them."""
    high, zeros_high = packed.qweight_high, packed.qzeros_high
    return (
        packed.qweight.data_ptr(),
        0 if high is None else high.data_ptr(),
        packed.scales.data_ptr(),
        packed.qzeros.data_ptr(),
        0 if zeros_high is None else zeros_high.data_ptr(),
        packed.outliers.data_ptr(),
    )


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


def _openmp() -> OpenMP:
    openmp = find_openmp()
    assert openmp is not None
    return openmp


@functools.cache
def _exact_linear(bits: int, dtype: torch.dtype, tokens: int) -> Any:
    return compile_linear(bits, dtype, tokens, _openmp().team)


@functools.cache
def _exact_dequantize(bits: int, dtype: torch.dtype) -> Any:
    return compile_dequantize(bits, dtype, _openmp().team)


@functools.cache
def _rounding(offset: int, span: int, block: int) -> Any:
    return compile_rounding(offset, span, block, _openmp().team)


@functools.cache
def _gemv(bits: int, dtype: torch.dtype, group_size: int, dot: str, tile: int) -> Any:
    return compile_gemv(bits, dtype, group_size, tile, dot, _openmp().team)


@functools.cache
def _gemm(bits: int, dtype: torch.dtype, group_size: int, dot: str, span: int) -> Any:
    return compile_gemm(bits, dtype, group_size, span, dot, _openmp().team)
