"""Calls of CPU kernels: memory for what is made of x, and for the output."""

import threading
from itertools import accumulate
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from tacq_vllm.kernels.cpu_rows import CpuWeight
from tacq_vllm.kernels.openmp import get_openmp

ARGUMENTS = (
    "x",
    "tiles",
    "codes",
    "scales",
    "sums",
    "out",
    "tokens",
    "columns",
    "groups",
    "out_features",
    "taken",
)
"""What kernels are given, as 64-bit integers, before the addresses of a weight.

Addresses of x [tokens, in]; of memory for what is made of x, the `areas`; of the output
[tokens, out], with room for whole tiles. Then sizes; and 0, to count in what threads
have taken.
"""

AREAS = 4
"""Pieces of memory for what is made of x."""


class Layout(Protocol):
    """What is made of rows of x."""

    @property
    def tile(self) -> int:
        """Tokens that are worked on together: whole tiles of the output are written."""

    def sizes(self, tokens: int, columns: int) -> tuple[int, int, int, int]:
        """Bytes of the areas."""


_MOST_HELD = 64 << 20
"""Bytes of memory that a thread holds for its next call, at most."""

_held = threading.local()


class Call(NamedTuple):
    """What calls with the same number of tokens have in common."""

    kernel: Any
    areas: tuple[int, ...]
    """Where they begin in the memory for what is made of x."""
    nbytes: int
    """Of that memory."""
    room: int
    """Rows of the output that are written."""

    def run(self, x: Tensor, weight: CpuWeight) -> Tensor:
        """Multiply x [tokens, columns], contiguous, with the weight: [tokens, out]."""
        kind, count = weight.kind, x.shape[0]
        memory = _memory(self.nbytes)
        out = torch.empty(self.room, kind.out_features, dtype=x.dtype)
        start = memory.data_ptr()
        get_openmp().run(
            self.kernel,
            x.data_ptr(),
            *[start + area for area in self.areas],
            out.data_ptr(),
            count,
            kind.columns,
            kind.groups,
            kind.out_features,
            0,
            *weight.addresses,
        )
        return out if self.room == count else out[:count]


def prepare(kernel: Any, layout: Layout, tokens: int, columns: int) -> Call:
    """All that a call depends on but where its tensors are; a token makes hundreds."""
    sizes = [-(-size // 64) * 64 for size in layout.sizes(tokens, columns)]
    *areas, nbytes = accumulate(sizes, initial=0)
    return Call(kernel, tuple(areas), nbytes, -(-tokens // layout.tile) * layout.tile)


def _memory(nbytes: int) -> Tensor:
    """Memory for one call, which the thread's next call is given again.

    That lies in the caches; and what is allocated anew may come page by page from the
    system, which can take longer than a small product.
    """
    if nbytes > _MOST_HELD:
        return torch.empty(nbytes, dtype=torch.uint8)
    memory: Tensor | None = getattr(_held, "memory", None)
    if memory is None or memory.numel() < nbytes:
        memory = _held.memory = torch.empty(nbytes, dtype=torch.uint8)
    return memory
