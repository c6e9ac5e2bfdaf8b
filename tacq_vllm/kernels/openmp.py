"""PyTorch's own OpenMP threads, for kernels that numba has compiled.

No second pool competes with PyTorch's for the cores.
"""

import ctypes
import functools
from array import array
from pathlib import Path
from typing import Any

import torch

from tacq_vllm.kernels.cpu_ir import Team


class OpenMP:
    """The OpenMP runtime that PyTorch has loaded."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._parallel = library.GOMP_parallel
        """Calls the C function at an address in every thread of a team."""
        address, count = ctypes.c_void_p, ctypes.c_uint
        self._parallel.argtypes = (address, address, count, count)
        self._parallel.restype = None
        library.GOMP_barrier.argtypes = ()
        library.GOMP_barrier.restype = None
        self.team = Team(
            library.omp_get_thread_num,
            library.omp_get_num_threads,
            library.GOMP_barrier,
        )
        for function in (library.omp_get_thread_num, library.omp_get_num_threads):
            function.argtypes = ()
            function.restype = ctypes.c_int32

    def run(self, kernel: Any, *arguments: int) -> None:
        """Call a compiled kernel in as many threads as PyTorch uses."""
        # Made in a third of the time that an array of ctypes takes.
        stored = array("q", arguments)
        address, _ = stored.buffer_info()
        self._parallel(kernel.address, address, torch.get_num_threads(), 0)


@functools.cache
def find_openmp() -> OpenMP | None:
    """PyTorch's runtime; None where it has none that is known."""
    # PyTorch uses one that was preloaded; else its own is among the mapped files.
    everything = ctypes.CDLL(None)
    if hasattr(everything, "GOMP_parallel"):
        return OpenMP(everything)
    maps = Path("/proc/self/maps")
    lines = maps.read_text().splitlines() if maps.is_file() else []
    # The path, which may have spaces in it, is the sixth field, if there is one.
    paths = {path for line in lines for path in line.split(maxsplit=5)[5:]}
    for path in sorted(paths):
        # GNU's runtime, or one of the two that stand in for it.
        if Path(path).name.startswith(("libgomp", "libiomp", "libomp")):
            return OpenMP(ctypes.CDLL(path))
    return None


def get_openmp() -> OpenMP:
    """PyTorch's runtime, where `find_openmp` finds one."""
    openmp = find_openmp()
    assert openmp is not None
    return openmp
