"""The exact linear on a CPU, compiled by numba, without a C compiler.

A row's packed words go straight into vector registers: 16 codes at a time are shifted
out of their words and their zero-point is taken off, all in float32. For few tokens
they are multiplied into x at once; for many, blocks of rows are dequantized into a
cache-sized buffer, for PyTorch's matrix product.

Threads are PyTorch's own: the kernels run in its OpenMP pool, so that no second pool
competes for the cores. A row belongs to one thread: for few tokens the same inputs give
the same bits with any number of threads; for many, that is up to PyTorch's product.
"""

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear as dense_linear

from tacq_vllm.format.linear import PackedLinear
from tacq_vllm.kernels.cpu_codegen import (
    ARGUMENTS,
    LANES,
    Team,
    compile_dequantize,
    compile_linear,
)
from tacq_vllm.kernels.reference import BLOCK_WEIGHTS

MAX_FUSED_TOKENS = 8
"""Rows of x up to which weights are multiplied in registers, without a buffer."""

_TOKEN_COUNTS = (1, 2, 4, MAX_FUSED_TOKENS)


def available() -> bool:
    """Whether this process has an OpenMP runtime that the kernels can run in."""
    return _openmp() is not None


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
    if tokens.shape[0] <= MAX_FUSED_TOKENS:
        out = _fused(tokens, packed)
    else:
        out = _blocked(tokens, packed)
    result = out.to(x.dtype).view(*x.shape[:-1], packed.out_features)
    return result if bias is None else result + bias


def warm_up(bits: int, dtype: torch.dtype) -> None:
    """Compile the kernels of one bit width, so that no request waits for it."""
    _dequantize_kernel(bits, dtype)
    for tokens in _TOKEN_COUNTS:
        _linear_kernel(bits, dtype, tokens)


def _fused(x: Tensor, packed: PackedLinear) -> Tensor:
    count = x.shape[0]
    tokens = next(size for size in _TOKEN_COUNTS if size >= count)
    if tokens != count:
        x = torch.cat((x, x.new_zeros(tokens - count, x.shape[1])))
    out = torch.empty(tokens, packed.out_features)
    kernel = _linear_kernel(packed.bits, packed.scales.dtype, tokens)
    _run(kernel, packed, x, out, 0, packed.out_features)
    return out[:count]


def _blocked(x: Tensor, packed: PackedLinear) -> Tensor:
    rows = max(1, BLOCK_WEIGHTS // packed.in_features)
    out = torch.empty(x.shape[0], packed.out_features)
    block = torch.empty(rows, packed.in_features)
    kernel = _dequantize_kernel(packed.bits, packed.scales.dtype)
    for start in range(0, packed.out_features, rows):
        stop = min(start + rows, packed.out_features)
        _run(kernel, packed, x, block, start, stop)
        out[:, start:stop] = dense_linear(x, block[: stop - start])
    return out


def _run(
    kernel: Any, packed: PackedLinear, x: Tensor, out: Tensor, start: int, stop: int
) -> None:
    """Call a kernel for rows [start, stop) in every thread of PyTorch's pool."""
    arguments = (ctypes.c_int64 * len(ARGUMENTS))(
        packed.qweight.data_ptr(),
        0 if packed.qweight_high is None else packed.qweight_high.data_ptr(),
        packed.scales.data_ptr(),
        packed.qzeros.data_ptr(),
        0 if packed.qzeros_high is None else packed.qzeros_high.data_ptr(),
        packed.outliers.data_ptr(),
        x.data_ptr(),
        out.data_ptr(),
        packed.out_features,
        packed.in_features,
        packed.in_features // packed.group_size,
        packed.group_size // LANES,
        start,
        stop,
    )
    openmp = _openmp()
    assert openmp is not None
    threads = torch.get_num_threads()
    openmp.parallel(kernel.address, ctypes.addressof(arguments), threads, 0)


class _OpenMP:
    """The OpenMP runtime that PyTorch has loaded."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.parallel = library.GOMP_parallel
        """Calls the C function at an address in every thread of a team."""
        address, count = ctypes.c_void_p, ctypes.c_uint
        self.parallel.argtypes = (address, address, count, count)
        self.parallel.restype = None
        self.team = Team(library.omp_get_thread_num, library.omp_get_num_threads)
        for function in (library.omp_get_thread_num, library.omp_get_num_threads):
            function.argtypes = ()
            function.restype = ctypes.c_int32


@functools.cache
def _openmp() -> _OpenMP | None:
    # PyTorch uses one that was preloaded; else its own is among the mapped files.
    everything = ctypes.CDLL(None)
    if hasattr(everything, "GOMP_parallel"):
        return _OpenMP(everything)
    maps = Path("/proc/self/maps")
    lines = maps.read_text().splitlines() if maps.is_file() else []
    for path in sorted({line.split()[-1] for line in lines}):
        # GNU's runtime, or one of the two that stand in for it.
        if Path(path).name.startswith(("libgomp", "libiomp", "libomp")):
            return _OpenMP(ctypes.CDLL(path))
    return None


@functools.cache
def _linear_kernel(bits: int, dtype: torch.dtype, tokens: int) -> Any:
    openmp = _openmp()
    assert openmp is not None
    return compile_linear(bits, dtype, tokens, openmp.team)


@functools.cache
def _dequantize_kernel(bits: int, dtype: torch.dtype) -> Any:
    openmp = _openmp()
    assert openmp is not None
    return compile_dequantize(bits, dtype, openmp.team)
