"""The linear on an x86 CPU, exact: weights become floats, and x is not rounded.

For few tokens they are multiplied with x as they are unpacked; for many, blocks of rows
are dequantized into a cache-sized buffer, for the matrix product of PyTorch.
"""

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear as dense_linear

from tacq_vllm.kernels.cpu_call import Call, prepare
from tacq_vllm.kernels.cpu_chunks import ChunkReader, chunk_reader
from tacq_vllm.kernels.cpu_dequantize import compile_dequantize
from tacq_vllm.kernels.cpu_float_lanes import FloatLanes
from tacq_vllm.kernels.cpu_gemv import compile_gemv
from tacq_vllm.kernels.cpu_rows import CpuWeight, WeightKind
from tacq_vllm.kernels.openmp import get_openmp
from tacq_vllm.kernels.reference import BLOCK_WEIGHTS

MAX_FUSED_TOKENS = 8
"""Rows of x up to which weights are multiplied as they are unpacked."""


def exact_linear(x: Tensor, weight: CpuWeight) -> Tensor:
    """Multiply x [tokens, columns], contiguous, with the weight: [tokens, out]."""
    values = x.to(torch.float32)
    count = x.shape[0]
    if count <= MAX_FUSED_TOKENS:
        return _call(weight.kind, count).run(values, weight).to(x.dtype)
    out = torch.empty(count, weight.kind.out_features)
    for start, stop, block in _blocks(weight):
        out[:, start:stop] = dense_linear(values, block)
    return out.to(x.dtype)


def exact_backward(grad: Tensor, weight: CpuWeight) -> Tensor:
    """The gradient of x, float32, for that of the product, [tokens, out]."""
    rows = grad.to(torch.float32)
    total = rows.new_zeros(rows.shape[0], weight.kind.columns)
    for start, stop, block in _blocks(weight):
        total.addmm_(rows[:, start:stop], block)
    return total


def warm_up(weight: CpuWeight) -> None:
    """Compile the kernels for weights like these."""
    reader = chunk_reader(weight.kind)
    _dequantize(reader)
    for tile in {_tile(count) for count in range(1, MAX_FUSED_TOKENS + 1)}:
        _gemv(reader, tile)


def _blocks(weight: CpuWeight) -> Iterator[tuple[int, int, Tensor]]:
    """Blocks of rows: the first, the one after the last, and their weight.

    That is float32 [rows, columns], in the same memory for all.
    """
    kind = weight.kind
    rows = max(1, BLOCK_WEIGHTS // kind.columns)
    block = torch.empty(rows, kind.columns)
    kernel = _dequantize(chunk_reader(kind))
    for start in range(0, kind.out_features, rows):
        stop = min(start + rows, kind.out_features)
        get_openmp().run(
            kernel,
            block.data_ptr(),
            kind.out_features,
            kind.columns,
            kind.groups,
            start,
            stop,
            *weight.addresses,
        )
        yield start, stop, block[: stop - start]


@functools.lru_cache(maxsize=1024)
def _call(kind: WeightKind, count: int) -> Call:
    """What products with so many tokens have in common."""
    kernel, lanes = _gemv(chunk_reader(kind), _tile(count))
    return prepare(kernel, lanes, count, kind.columns)


def _tile(count: int) -> int:
    """Tokens that are worked on together."""
    return 1 << (count - 1).bit_length()


@functools.cache
def _gemv(reader: ChunkReader, tile: int) -> tuple[Any, FloatLanes]:
    """The kernel for few tokens, and what it makes of x."""
    lanes = FloatLanes(reader, tile)
    return compile_gemv(lanes, get_openmp().team), lanes


@functools.cache
def _dequantize(reader: ChunkReader) -> Any:
    """The kernel that makes rows floats."""
    return compile_dequantize(reader, get_openmp().team)
