"""The linear on an x86 CPU with x rounded to 8 bits."""

import functools
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from tacq_vllm.kernels import cpu_amx, cpu_tile_dots
from tacq_vllm.kernels.cpu_amx import has_amx
from tacq_vllm.kernels.cpu_chunks import ChunkReader, lane_span, supports_groups
from tacq_vllm.kernels.cpu_dots import best_dot
from tacq_vllm.kernels.cpu_int8_gemm import compile_gemm
from tacq_vllm.kernels.cpu_int8_gemv import compile_gemv
from tacq_vllm.kernels.cpu_panels import Panels
from tacq_vllm.kernels.cpu_rows import CpuWeight, Rows
from tacq_vllm.kernels.cpu_token_lanes import TokenLanes
from tacq_vllm.kernels.cpu_token_tiles import TokenTiles
from tacq_vllm.kernels.openmp import get_openmp

MANY = 0
"""Stands for any number of tokens."""

MAX_GEMV_TOKENS = 4
"""Rows of x up to which weights are multiplied as they are unpacked."""


def int8_supports(weight: CpuWeight) -> bool:
    """Whether the kernels multiply weights with groups like these."""
    return supports_groups(weight)


def int8_linear(x: Tensor, weight: CpuWeight) -> Tensor:
    """Multiply x [tokens, columns], contiguous, with the weight: [tokens, out]."""
    count, columns = x.shape
    tile = _tile(count)
    kernel, layout = _kernel(*_kind(weight), x.dtype, _dot(tile), tile)
    sizes = [-(-size // 64) * 64 for size in layout.sizes(count, columns)]
    scratch = torch.empty(sum(sizes), dtype=torch.uint8)
    out = torch.empty(layout.room(count), weight.out_features, dtype=x.dtype)
    get_openmp().run(
        kernel,
        (
            x.data_ptr(),
            *accumulate(sizes[:-1], initial=scratch.data_ptr()),
            out.data_ptr(),
            count,
            columns,
            weight.groups,
            weight.out_features,
            *weight.addresses,
        ),
    )
    return out[:count]


def warm_up(weight: CpuWeight, x_dtype: torch.dtype) -> None:
    """Compile the kernels for weights like these."""
    for tile in {_tile(count) for count in range(1, MAX_GEMV_TOKENS + 2)}:
        _kernel(*_kind(weight), x_dtype, _dot(tile), tile)


def int8_name() -> str:
    """Which instructions are used."""
    return " ".join(dict.fromkeys((_dot(1), _dot(MANY))))


def _tile(count: int) -> int:
    """Tokens that are worked on together."""
    return MANY if count > MAX_GEMV_TOKENS else 1 << (count - 1).bit_length()


def _dot(tile: int) -> str:
    """Instructions for products of bytes."""
    dot = best_dot()
    return "amx" if tile == MANY and dot == "avx512vnni" and has_amx() else dot


def _kind(weight: CpuWeight) -> tuple[Rows, int, int]:
    """What kernels are compiled for.

    How rows are stored; columns of a group, 0 for the row; of x that share a scale.
    """
    size, block = weight.group_size, 4 * lane_span(weight.rows)
    while size % block:
        block //= 2
    return weight.rows, 0 if weight.groups == 1 else size, block


@functools.cache
def _kernel(
    rows: Rows, group_size: int, block: int, x_dtype: torch.dtype, dot: str, tile: int
) -> tuple[Any, TokenLanes | TokenTiles]:
    """The kernel for a tile of tokens, or for many, and what it makes of x."""
    team, reader = get_openmp().team, ChunkReader(rows, group_size)
    if tile == MANY:
        bias = cpu_amx.BIAS if dot == "amx" else cpu_tile_dots.BIAS
        tiles = TokenTiles(x_dtype, rows.stride, block, bias)
        return compile_gemm(Panels(reader, block, bias), tiles, dot, team), tiles
    lanes = TokenLanes(x_dtype, rows.stride, block, tile)
    return compile_gemv(reader, lanes, dot, team), lanes
