"""The exact linear for few tokens on a CPU, compiled by numba, without a C compiler.

A row's packed words go straight into vector registers: 16 codes at a time are shifted
out of their words, their zero-point is taken off, and they are multiplied into x, all
in float32. Threads are PyTorch's own: the kernel runs in its OpenMP pool, so that no
second pool competes for the cores. A row belongs to one thread: the same inputs give
the same bits with any number of threads.
"""

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tacq_vllm.format.linear import PackedLinear
from tacq_vllm.kernels.cpu_codegen import LANES, NUM_ARGUMENTS, compile_body

MAX_TOKENS = 8
"""Rows of x that one pass over the weight serves."""

_TOKEN_COUNTS = (1, 2, 4, MAX_TOKENS)


def available() -> bool:
    """Whether this process has an OpenMP runtime that the kernel can run in."""
    return _openmp() is not None


def supports(x: Tensor, packed: PackedLinear) -> bool:
    """Whether the kernel serves these tensors."""
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
    out = torch.empty(tokens.shape[0], packed.out_features)
    for start in range(0, tokens.shape[0], MAX_TOKENS):
        _run(tokens[start : start + MAX_TOKENS], packed, out[start:])
    result = out.to(x.dtype).view(*x.shape[:-1], packed.out_features)
    return result if bias is None else result + bias


def warm_up(bits: int, dtype: torch.dtype) -> None:
    """Compile the kernels of one bit width, so that no request waits for it."""
    for tokens in _TOKEN_COUNTS:
        _kernel(bits, dtype, tokens)


def _run(x: Tensor, packed: PackedLinear, out: Tensor) -> None:
    count = x.shape[0]
    tokens = next(size for size in _TOKEN_COUNTS if size >= count)
    target = out
    if tokens != count:
        x = torch.cat((x, x.new_zeros(tokens - count, x.shape[1])))
        target = torch.empty(tokens, packed.out_features)
    group_size = packed.group_size
    high, zeros_high = packed.qweight_high, packed.qzeros_high
    arguments = (ctypes.c_int64 * NUM_ARGUMENTS)(
        packed.qweight.data_ptr(),
        0 if high is None else high.data_ptr(),
        packed.scales.data_ptr(),
        packed.qzeros.data_ptr(),
        0 if zeros_high is None else zeros_high.data_ptr(),
        packed.outliers.data_ptr(),
        x.data_ptr(),
        target.data_ptr(),
        packed.out_features,
        packed.in_features,
        packed.in_features // group_size,
        group_size // LANES,
    )
    body = _kernel(packed.bits, packed.scales.dtype, tokens)
    openmp = _openmp()
    assert openmp is not None
    openmp.parallel(body.address, ctypes.addressof(arguments), torch.get_num_threads())
    if target is not out:
        out[:count] = target[:count]


class _OpenMP:
    """The OpenMP runtime that PyTorch has loaded."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._parallel = library.GOMP_parallel
        self._parallel.argtypes = (
            ctypes.c_void_p,
            ctypes.c_void_p,
            ctypes.c_uint,
            ctypes.c_uint,
        )
        self._parallel.restype = None
        self.thread_number = library.omp_get_thread_num
        self.thread_number.restype = ctypes.c_int32
        self.thread_number.argtypes = ()
        self.num_threads = library.omp_get_num_threads
        self.num_threads.restype = ctypes.c_int32
        self.num_threads.argtypes = ()

    def parallel(self, function: int, argument: int, threads: int) -> None:
        """Call the C function at an address in every thread of a team."""
        self._parallel(function, argument, threads, 0)


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
def _kernel(bits: int, dtype: torch.dtype, tokens: int) -> Any:
    openmp = _openmp()
    assert openmp is not None
    return compile_body(bits, dtype, tokens, openmp.thread_number, openmp.num_threads)
