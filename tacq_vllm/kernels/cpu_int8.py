"""The linear on an x86 CPU with x rounded to 8 bits."""

import functools
from typing import Any

import torch
from torch import Tensor

from tacq_vllm.format.linear import PackedLinear
from tacq_vllm.kernels.cpu_chunks import ChunkReader, lane_columns
from tacq_vllm.kernels.cpu_dots import best_dot
from tacq_vllm.kernels.cpu_int8_gemm import OFFSET, OUT_TILE, TILE, compile_gemm
from tacq_vllm.kernels.cpu_int8_gemv import compile_gemv
from tacq_vllm.kernels.cpu_ir import LANES
from tacq_vllm.kernels.cpu_rounding import Rounding
from tacq_vllm.kernels.cpu_rows import weight_addresses
from tacq_vllm.kernels.openmp import get_openmp

MANY = 0
"""Stands for any number of tokens."""

MAX_GEMV_TOKENS = 4
"""Rows of x up to which weights are multiplied as they are unpacked."""


def int8_linear(x: Tensor, packed: PackedLinear) -> Tensor:
    """Multiply x [tokens, in], contiguous, with the weight: [tokens, out]."""
    count, columns = x.shape
    kernel, rounding = _kernel(*_kind(packed, x.dtype), _tile(count))
    chunks = -(-columns // rounding.columns)
    tokens = -(-count // rounding.tile) * rounding.tile
    room = -(-count // rounding.out_tile) * rounding.out_tile
    lanes = tokens * chunks * LANES * 4
    sizes = (room * columns * 4, tokens * chunks * rounding.columns, lanes, lanes)
    scratch = torch.empty(sum(sizes), dtype=torch.uint8)
    places = [scratch.data_ptr()]
    for size in sizes[:-1]:
        places.append(places[-1] + size)
    out = torch.empty(room, packed.out_features, dtype=x.dtype)
    get_openmp().run(
        kernel,
        (
            *weight_addresses(packed),
            x.data_ptr(),
            *places,
            out.data_ptr(),
            count,
            columns,
            chunks,
            columns // packed.group_size,
            packed.out_features,
        ),
    )
    return out[:count]


def warm_up(packed: PackedLinear, x_dtype: torch.dtype) -> None:
    """Compile the kernels for weights like these."""
    for tile in {_tile(count) for count in range(1, MAX_GEMV_TOKENS + 2)}:
        _kernel(*_kind(packed, x_dtype), tile)


def _tile(count: int) -> int:
    """Tokens that are worked on together."""
    return MANY if count > MAX_GEMV_TOKENS else 1 << (count - 1).bit_length()


def _kind(
    packed: PackedLinear, x_dtype: torch.dtype
) -> tuple[int, torch.dtype, int, int, torch.dtype, str]:
    """What kernels are compiled for; a group of 0 columns is the row."""
    whole = packed.group_size == packed.in_features
    return (
        packed.bits,
        packed.scales.dtype,
        0 if whole else packed.group_size,
        lane_columns(packed.group_size, packed.in_features),
        x_dtype,
        best_dot(),
    )


@functools.cache
def _kernel(
    bits: int,
    dtype: torch.dtype,
    group_size: int,
    widest: int,
    x_dtype: torch.dtype,
    dot: str,
    tile: int,
) -> tuple[Any, Rounding]:
    """The kernel for a tile of tokens, or for many, and what it makes of x."""
    team, block = get_openmp().team, max(32, widest)
    if tile == MANY:
        reader = ChunkReader(bits, dtype, group_size, widest)
        rounding = Rounding(x_dtype, widest, block, OFFSET, TILE, OUT_TILE)
        return compile_gemm(reader, rounding, dot, team), rounding
    reader = ChunkReader(bits, dtype, group_size, 16)
    rounding = Rounding(x_dtype, 16, block, 0, tile, tile)
    return compile_gemv(reader, rounding, dot, team), rounding
