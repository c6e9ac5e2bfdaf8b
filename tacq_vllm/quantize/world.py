"""The processes of a run: one, or several that torchrun started.

They share out calibration samples and add up what they measured on them; then all hold
the same sums. The work folder must be the same for all.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

_PATIENCE = timedelta(days=7)
"""The others wait while the leader downloads a model, converts it or writes text. Where
one has died, torchrun ends the rest."""


@dataclass(frozen=True)
class World:
    """Which process this is, and of how many."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process writes what all have found together."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> list[T]:
        """The items that this process works on."""
        return list(items[self.rank :: self.size])

    def add_up(self, tensor: Tensor) -> None:
        """Replace a tensor by its sum over all processes."""
        if self.size > 1:
            dist.all_reduce(tensor)

    def rows(self, count: int, multiple: int = 1) -> slice:
        """The rows of a matrix that this process works on.

        Blocks of `multiple` rows, counted from the first, stay together.
        """
        each = self._rows_each(count, multiple)
        return slice(min(self.rank * each, count), min((self.rank + 1) * each, count))

    def gather_rows(self, part: Tensor, count: int, multiple: int = 1) -> Tensor:
        """Join the rows that each process has worked on: [count, ...]."""
        if self.size == 1:
            return part
        each = self._rows_each(count, multiple)
        padded = part.new_zeros(each, *part.shape[1:])
        padded[: part.shape[0]] = part
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(parts, padded)
        return torch.cat(parts)[:count]

    def _rows_each(self, count: int, multiple: int) -> int:
        return -(-count // (self.size * multiple)) * multiple

    @contextmanager
    def leader_first(self) -> Iterator[None]:
        """Run the body in the leading process, and then in the others."""
        if not self.leads:
            self.wait()
        yield
        if self.leads:
            self.wait()

    def wait(self) -> None:
        """Go on when all processes have come here."""
        if self.size > 1:
            dist.barrier()


@contextmanager
def open_world(device: torch.device) -> Iterator[tuple[World, torch.device]]:
    """Join the processes that torchrun started, if it did; each has its own GPU."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield World(), device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=_PATIENCE)
    try:
        yield World(dist.get_rank(), dist.get_world_size()), device
    finally:
        dist.destroy_process_group()
