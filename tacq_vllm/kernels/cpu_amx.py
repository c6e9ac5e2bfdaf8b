"""The linear on a processor with Intel's AMX, for more than a few tokens.

Weights, the kept ones among them, are unpacked to bfloat16, a few rows and columns at a
time, and multiplied with x in tile registers, which add up in float32. Weights are
rounded, and x if it is in float16.
"""

import functools
from typing import Any

import torch
from llvmlite import binding
from torch import Tensor

from tacq_vllm.kernels.cpu_amx_gemm import compile_gemm
from tacq_vllm.kernels.cpu_amx_tokens import AmxTokens
from tacq_vllm.kernels.cpu_amx_weight import AmxWeight
from tacq_vllm.kernels.cpu_call import Call, prepare
from tacq_vllm.kernels.cpu_chunks import ChunkReader, chunk_reader
from tacq_vllm.kernels.cpu_rows import CpuWeight, WeightKind
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
    return _call(weight.kind, x.dtype, x.shape[0]).run(x, weight)


def warm_up(weight: CpuWeight, x_dtype: torch.dtype) -> None:
    """Compile the kernel for weights like these."""
    _kernel(chunk_reader(weight.kind), x_dtype)


@functools.lru_cache(maxsize=1024)
def _call(kind: WeightKind, x_dtype: torch.dtype, count: int) -> Call:
    """What products with so many tokens have in common."""
    kernel, tokens = _kernel(chunk_reader(kind), x_dtype)
    return prepare(kernel, tokens, count, kind.columns)


@functools.cache
def _kernel(reader: ChunkReader, x_dtype: torch.dtype) -> tuple[Any, AmxTokens]:
    """The kernel, and what it makes of x."""
    tokens = AmxTokens(x_dtype, reader.rows.stride)
    return compile_gemm(AmxWeight(reader), tokens, get_openmp().team), tokens
