"""What the decoder blocks hand on to each other, on disk in between."""

from typing import Literal

import torch
from torch import Tensor

from tacq_vllm.quantize.workdir import PhaseFolder


class Boundaries:
    """A tensor for each boundary between blocks and each sample or batch.

    Boundary i lies before block i; the last one lies behind all blocks.

    Args:
        folder: keeps a file for each.
        kind: what they are; files are named by it.
        device: where they are loaded to.
    """

    def __init__(
        self,
        folder: PhaseFolder,
        kind: Literal["hidden", "gradient"],
        device: torch.device,
    ) -> None:
        self._folder = folder
        self._kind = kind
        self._device = device

    def save(self, boundary: int, number: int, tensor: Tensor) -> None:
        """Store the tensor of a sample or batch, by its number."""
        self._folder.save(self._name(boundary, number), {self._kind: tensor})

    def load(self, boundary: int, number: int) -> Tensor:
        """Copy a tensor to the device."""
        tensor = self._folder.load_tensor(self._name(boundary, number), self._kind)
        return tensor.to(self._device, copy=True)

    def has(self, boundary: int, number: int) -> bool:
        """Whether a tensor is stored."""
        return self._name(boundary, number) in self._folder

    def remove(self, boundary: int, number: int) -> None:
        """Remove a tensor that nobody needs any more, if it is there."""
        self._folder.remove(self._name(boundary, number))

    def sweep(self) -> None:
        """Remove all: a run that was killed may have left some of a finished step."""
        self._folder.sweep(self._kind)

    def _name(self, boundary: int, number: int) -> str:
        return f"{self._kind}-{boundary:04d}-{number:06d}"
