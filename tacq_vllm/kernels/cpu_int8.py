"""The linear on an x86 CPU with x rounded to 8 bits."""

import functools
from typing import Any

import torch
from torch import Tensor

from tacq_vllm.kernels.cpu_chunks import (
    ChunkReader,
    narrow_span,
    supports_groups,
    wide_span,
)
from tacq_vllm.kernels.cpu_dots import best_dot
from tacq_vllm.kernels.cpu_int8_gemm import OFFSET, OUT_TILE, TILE, compile_gemm
from tacq_vllm.kernels.cpu_int8_gemv import compile_gemv
from tacq_vllm.kernels.cpu_ir import LANES
from tacq_vllm.kernels.cpu_rounding import Rounding
from tacq_vllm.kernels.cpu_rows import CpuWeight, Rows
from tacq_vllm.kernels.openmp import get_openmp

MANY = 0
"""Stands for any number of tokens."""

MAX_GEMV_TOKENS = 4
"""Rows of x up to which weights are multiplied as they are unpacked."""


def int8_supports(weight: CpuWeight) -> bool:
    """Whether the kernels multiply weights with groups like these."""
    return supports_groups(weight, narrow_span(weight.rows))


def int8_linear(x: Tensor, weight: CpuWeight) -> Tensor:
    """Multiply x [tokens, columns], contiguous, with the weight: [tokens, out]."""
    count, columns = x.shape
    kernel, rounding = _kernel(*_kind(weight), x.dtype, best_dot(), _tile(count))
    chunks = -(-columns // rounding.columns)
    tokens = -(-count // rounding.tile) * rounding.tile
    room = -(-count // rounding.out_tile) * rounding.out_tile
    lanes = tokens * chunks * LANES * 4
    sizes = (room * columns * 4, tokens * chunks * rounding.columns, lanes, lanes)
    scratch = torch.empty(sum(sizes), dtype=torch.uint8)
    places = [scratch.data_ptr()]
    for size in sizes[:-1]:
        places.append(places[-1] + size)
    out = torch.empty(room, weight.out_features, dtype=x.dtype)
    get_openmp().run(
        kernel,
        (
            x.data_ptr(),
            *places,
            out.data_ptr(),
            count,
            columns,
            chunks,
            weight.groups,
            weight.out_features,
            *weight.addresses,
        ),
    )
    return out[:count]


def warm_up(weight: CpuWeight, x_dtype: torch.dtype) -> None:
    """Compile the kernels for weights like these."""
    for tile in {_tile(count) for count in range(1, MAX_GEMV_TOKENS + 2)}:
        _kernel(*_kind(weight), x_dtype, best_dot(), tile)


def _tile(count: int) -> int:
    """Tokens that are worked on together."""
    return MANY if count > MAX_GEMV_TOKENS else 1 << (count - 1).bit_length()


def _kind(weight: CpuWeight) -> tuple[Rows, int, int, int]:
    """What kernels are compiled for.

    How rows are stored; columns of a group, 0 for the row; of x that share a scale; of
    a lane, where there are many tokens.
    """
    narrow, wide = narrow_span(weight.rows), wide_span(weight.rows)
    size = weight.group_size
    block = wide if size % wide == 0 else wide // 2
    span = wide if supports_groups(weight, wide) else narrow
    return weight.rows, 0 if weight.groups == 1 else size, block, span


@functools.cache
def _kernel(
    rows: Rows,
    group_size: int,
    block: int,
    span: int,
    x_dtype: torch.dtype,
    dot: str,
    tile: int,
) -> tuple[Any, Rounding]:
    """The kernel for a tile of tokens, or for many, and what it makes of x."""
    team, stride = get_openmp().team, rows.stride
    if tile == MANY:
        reader = ChunkReader(rows, group_size, span)
        rounding = Rounding(x_dtype, span, stride, block, OFFSET, TILE, OUT_TILE)
        return compile_gemm(reader, rounding, dot, team), rounding
    reader = ChunkReader(rows, group_size, narrow_span(rows))
    rounding = Rounding(x_dtype, reader.span, stride, block, 0, tile, tile)
    return compile_gemv(reader, rounding, dot, team), rounding
