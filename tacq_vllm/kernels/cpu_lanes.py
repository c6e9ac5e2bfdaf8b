"""What few rows of x become, for products with the lanes of a weight's chunks."""

from typing import Any, Protocol

import torch

from tacq_vllm.kernels.cpu_call import Layout
from tacq_vllm.kernels.cpu_chunks import ChunkReader
from tacq_vllm.kernels.cpu_ir import Team
from tacq_vllm.kernels.cpu_rows import Row


class Lanes(Layout, Protocol):
    """All rows of x, at most a tile of them; the last is repeated to make one."""

    @property
    def reader(self) -> ChunkReader:
        """Reads the weight."""

    @property
    def dtype(self) -> torch.dtype:
        """The type of x."""

    @property
    def part(self) -> int:
        """Chunks of x that stay in the first cache."""

    def arranger(self, team: Team) -> Any:
        """Compile what fills the areas, given a kernel's arguments.

        All threads of a team share the work, and wait until it is done.
        """

    def add_chunk(
        self,
        builder: Any,
        row: Row,
        areas: list[Any],
        index: Any,
        rest: Any,
        grid: tuple[Any, Any],
        totals: list[Any],
    ) -> None:
        """Add the products of x and a row's chunk to slots of sums, one for each token.

        Args:
            builder: what appends instructions.
            row: the row.
            areas: their addresses.
            index: the chunk's number.
            rest: how many of its columns exist; None: all.
            grid: scale and zero-point of its lanes.
            totals: the slots.
        """
