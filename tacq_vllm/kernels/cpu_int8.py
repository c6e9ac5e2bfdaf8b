"""The linear on an x86 CPU with x rounded to 8 bits."""

import functools
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tacq_vllm.kernels.cpu_chunks import ChunkReader, lane_span, supports_groups
from tacq_vllm.kernels.cpu_dots import best_dot
from tacq_vllm.kernels.cpu_int8_gemm import compile_gemm
from tacq_vllm.kernels.cpu_int8_gemv import compile_gemv
from tacq_vllm.kernels.cpu_panels import Panels
from tacq_vllm.kernels.cpu_rows import CpuWeight, Rows, WeightKind
from tacq_vllm.kernels.cpu_token_lanes import TokenLanes
from tacq_vllm.kernels.cpu_token_tiles import TokenTiles
from tacq_vllm.kernels.openmp import get_openmp

MANY = 0
"""Stands for any number of tokens."""

_AHEAD = 32
"""Chunks of a row by which memory is asked for before it is read."""

MAX_GEMV_TOKENS = 4
"""Rows of x up to which weights are multiplied as they are unpacked."""


def int8_supports(weight: CpuWeight) -> bool:
    """Whether the kernels multiply weights with groups like these."""
    return supports_groups(weight.kind)


def int8_linear(x: Tensor, weight: CpuWeight) -> Tensor:
    """Multiply x [tokens, columns], contiguous, with the weight: [tokens, out]."""
    kind, count = weight.kind, x.shape[0]
    call = _call(kind, x.dtype, best_dot(), count)
    scratch = torch.empty(call.scratch_bytes, dtype=torch.uint8)
    out = torch.empty(call.room, kind.out_features, dtype=x.dtype)
    start = scratch.data_ptr()
    get_openmp().run(
        call.kernel,
        x.data_ptr(),
        start,
        start + call.codes_at,
        start + call.scales_at,
        start + call.sums_at,
        out.data_ptr(),
        count,
        kind.columns,
        kind.groups,
        kind.out_features,
        *weight.addresses,
    )
    return out if call.room == count else out[:count]


def warm_up(weight: CpuWeight, x_dtype: torch.dtype, few: bool) -> None:
    """Compile the kernels for weights like these; for few tokens only, if asked."""
    most = MAX_GEMV_TOKENS if few else MAX_GEMV_TOKENS + 1
    for tile in {_tile(count) for count in range(1, most + 1)}:
        _kernel(*_compiled_for(weight.kind), x_dtype, best_dot(), tile)


def _tile(count: int) -> int:
    """Tokens that are worked on together."""
    return MANY if count > MAX_GEMV_TOKENS else 1 << (count - 1).bit_length()


class _Call(NamedTuple):
    """What calls with the same number of tokens have in common."""

    kernel: Any
    scratch_bytes: int
    """For what is made of x: first its tiles, the rest where it is said here."""
    codes_at: int
    scales_at: int
    sums_at: int
    room: int
    """Rows of the output that are written."""


@functools.lru_cache(maxsize=1024)
def _call(kind: WeightKind, x_dtype: torch.dtype, dot: str, count: int) -> _Call:
    """All that a call depends on but where its tensors are; a token makes hundreds."""
    kernel, layout = _kernel(*_compiled_for(kind), x_dtype, dot, _tile(count))
    sizes = [-(-size // 64) * 64 for size in layout.sizes(count, kind.columns)]
    codes_at, scales_at, sums_at, end = accumulate(sizes)
    return _Call(kernel, end, codes_at, scales_at, sums_at, layout.room(count))


def _compiled_for(kind: WeightKind) -> tuple[Rows, int, int]:
    """What kernels are compiled for.

    How rows are stored; columns of a group, 0 for the row; of x that share a scale.
    """
    size, block = kind.group_size, 4 * lane_span(kind.rows)
    while size % block:
        block //= 2
    return kind.rows, 0 if kind.groups == 1 else size, block


@functools.cache
def _kernel(
    rows: Rows, group_size: int, block: int, x_dtype: torch.dtype, dot: str, tile: int
) -> tuple[Any, TokenLanes | TokenTiles]:
    """The kernel for a tile of tokens, or for many, and what it makes of x."""
    team, reader = get_openmp().team, ChunkReader(rows, group_size, _AHEAD)
    if tile == MANY:
        tiles = TokenTiles(x_dtype, rows.stride, block)
        return compile_gemm(Panels(reader, block), tiles, dot, team), tiles
    lanes = TokenLanes(x_dtype, rows.stride, block, tile)
    return compile_gemv(reader, lanes, dot, team), lanes
