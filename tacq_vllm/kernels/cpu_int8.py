"""The linear on an x86 CPU with x rounded to 8 bits."""

import functools
from typing import Any

import torch
from torch import Tensor

from tacq_vllm.kernels.cpu_byte_lanes import ByteLanes
from tacq_vllm.kernels.cpu_call import Call, prepare
from tacq_vllm.kernels.cpu_chunks import ChunkReader, chunk_reader
from tacq_vllm.kernels.cpu_dots import best_dot
from tacq_vllm.kernels.cpu_gemv import compile_gemv
from tacq_vllm.kernels.cpu_int8_gemm import compile_gemm
from tacq_vllm.kernels.cpu_panels import Panels
from tacq_vllm.kernels.cpu_rows import CpuWeight, WeightKind
from tacq_vllm.kernels.cpu_token_tiles import TokenTiles
from tacq_vllm.kernels.openmp import get_openmp

MANY = 0
"""Stands for any number of tokens."""

MAX_GEMV_TOKENS = 4
"""Rows of x up to which weights are multiplied as they are unpacked."""


def int8_linear(x: Tensor, weight: CpuWeight) -> Tensor:
    """Multiply x [tokens, columns], contiguous, with the weight: [tokens, out]."""
    return _call(weight.kind, x.dtype, best_dot(), x.shape[0]).run(x, weight)


def warm_up(weight: CpuWeight, x_dtype: torch.dtype, few: bool) -> None:
    """Compile the kernels for weights like these; for few tokens only, if asked."""
    most = MAX_GEMV_TOKENS if few else MAX_GEMV_TOKENS + 1
    for tile in {_tile(count) for count in range(1, most + 1)}:
        _kernel(*_compiled_for(weight.kind), x_dtype, best_dot(), tile)


def _tile(count: int) -> int:
    """Tokens that are worked on together."""
    return MANY if count > MAX_GEMV_TOKENS else 1 << (count - 1).bit_length()


@functools.lru_cache(maxsize=1024)
def _call(kind: WeightKind, x_dtype: torch.dtype, dot: str, count: int) -> Call:
    """What products with so many tokens have in common."""
    kernel, layout = _kernel(*_compiled_for(kind), x_dtype, dot, _tile(count))
    return prepare(kernel, layout, count, kind.columns)


def _compiled_for(kind: WeightKind) -> tuple[ChunkReader, int]:
    """What kernels are compiled for: what reads weights; columns that share a scale."""
    reader = chunk_reader(kind)
    block = 4 * reader.span
    while kind.group_size % block:
        block //= 2
    return reader, block


@functools.cache
def _kernel(
    reader: ChunkReader, block: int, x_dtype: torch.dtype, dot: str, tile: int
) -> tuple[Any, ByteLanes | TokenTiles]:
    """The kernel for a tile of tokens, or for many, and what it makes of x."""
    team = get_openmp().team
    if tile == MANY:
        tiles = TokenTiles(x_dtype, reader.rows.stride, block)
        return compile_gemm(Panels(reader, block), tiles, dot, team), tiles
    lanes = ByteLanes(reader, x_dtype, block, tile, dot)
    return compile_gemv(lanes, team), lanes
