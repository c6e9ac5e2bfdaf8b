"""The linear on a processor with Intel's AMX, for more than a few tokens.

Weights, the kept ones among them, are unpacked to bfloat16, a few rows and columns at a
time, and multiplied with x in tile registers, which add up in float32. Weights are
rounded, and x if it is in float16.
"""

import functools
from typing import Any, NamedTuple

import torch
from llvmlite import binding
from torch import Tensor

from tacq_vllm.kernels.cpu_amx_gemm import compile_gemm
from tacq_vllm.kernels.cpu_amx_tokens import AmxTokens
from tacq_vllm.kernels.cpu_amx_weight import AmxWeight
from tacq_vllm.kernels.cpu_chunks import ChunkReader, group_columns
from tacq_vllm.kernels.cpu_rows import CpuWeight, Rows, WeightKind
from tacq_vllm.kernels.openmp import get_openmp

_FEATURES = ("amx-bf16", "avx512bf16")


@functools.cache
def has_amx() -> bool:
    """Whether the processor has AMX for bfloat16, and the system lets us use it.

    The process asks for that once; its other threads may use it then, too.
    """
    features = binding.get_host_cpu_features()
    return all(map(features.get, _FEATURES)) and bool(torch.cpu._init_amx())


def amx_linear(x: Tensor, weight: CpuWeight) -> Tensor:
    """Multiply x [tokens, columns], contiguous, in 16 bits: [tokens, out]."""
    kind, count = weight.kind, x.shape[0]
    call = _call(kind, x.dtype, count)
    tiles = torch.empty(call.tiles_bytes, dtype=torch.uint8)
    out = torch.empty(call.room, kind.out_features, dtype=x.dtype)
    get_openmp().run(
        call.kernel,
        x.data_ptr(),
        tiles.data_ptr(),
        out.data_ptr(),
        count,
        kind.columns,
        kind.groups,
        kind.out_features,
        0,
        *weight.addresses,
    )
    return out if call.room == count else out[:count]


def warm_up(weight: CpuWeight, x_dtype: torch.dtype) -> None:
    """Compile the kernel for weights like these."""
    _kernel(*_compiled_for(weight.kind), x_dtype)


class _Call(NamedTuple):
    """What calls with the same number of tokens have in common."""

    kernel: Any
    tiles_bytes: int
    """For what is made of x."""
    room: int
    """Rows of the output that are written."""


@functools.lru_cache(maxsize=1024)
def _call(kind: WeightKind, x_dtype: torch.dtype, count: int) -> _Call:
    """All that a call depends on but where its tensors are; a token makes hundreds."""
    kernel, tokens = _kernel(*_compiled_for(kind), x_dtype)
    return _Call(kernel, tokens.size(count, kind.columns), tokens.room(count))


def _compiled_for(kind: WeightKind) -> tuple[Rows, int]:
    """What the kernel is compiled for: how rows are stored; columns of a group."""
    return kind.rows, group_columns(kind)


@functools.cache
def _kernel(rows: Rows, group_size: int, x_dtype: torch.dtype) -> tuple[Any, AmxTokens]:
    """The kernel, and what it makes of x."""
    weight = AmxWeight(ChunkReader(rows, group_size))
    tokens = AmxTokens(x_dtype, rows.stride)
    return compile_gemm(weight, tokens, get_openmp().team), tokens
