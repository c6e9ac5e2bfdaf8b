"""What a quantizing pass has stored: a file for each block, and how to read it."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, fields

from torch import Tensor

from tacq_vllm.format.stored import Layout, StoredLinear
from tacq_vllm.kernels.reference import dequantize
from tacq_vllm.quantize.model import BaseModel
from tacq_vllm.quantize.rounder import Rounder
from tacq_vllm.quantize.workdir import PhaseFolder


@dataclass(frozen=True)
class LinearReport:
    """What quantizing one linear gave."""

    name: str
    bits: int
    group_size: int
    outliers: int
    stored_bytes: int
    """What all its parts take when they are packed."""
    error: float
    """Squared output error over squared output, on the calibration text; of a method
    that needs no text, squared error over squared weight."""
    damp_percent: float | None
    """Damping of the Hessian, of a method that has one."""


REPORT_FIELDS = [field.name for field in fields(LinearReport)]
"""Part of a pass's fingerprint: results that were stored with other fields are not
read."""


class QuantizedBlocks:
    """The stored result of a pass.

    Args:
        base: the model that was quantized.
        rounder: what has quantized it.
        folder: has a file for each block, `block_file`.
    """

    def __init__(self, base: BaseModel, rounder: Rounder, folder: PhaseFolder) -> None:
        self._base = base
        self._rounder = rounder
        self._folder = folder

    @property
    def layout(self) -> Layout | None:
        """How codes are packed; None: simulated, the tensors are 16-bit weights."""
        return self._rounder.layout

    def tensors(self, linear: str) -> dict[str, Tensor]:
        """What the checkpoint holds of a linear, mapped from its file."""
        prefix = f"{linear}."
        stored = self._folder.load(block_file(self._base.block_of(linear)), prefix)
        return {name.removeprefix(prefix): t for name, t in stored.items()}

    def packed(self, linear: str) -> StoredLinear:
        """The tensors of one linear that is packed."""
        assert self.layout is not None
        in_features = self._base.linears()[linear].in_features
        return self.layout.linear(self.tensors(linear), in_features)

    def weight(self, linear: str) -> Tensor:
        """What a packed linear stands for: float32 [out, in] on the device."""
        return dequantize(self.packed(linear)).to(self._base.device)

    def reports(self) -> Iterator[LinearReport]:
        """The report of every linear, in order."""
        for notes in self._notes():
            for report in json.loads(notes["reports"]):
                yield LinearReport(**report)

    def seconds(self) -> list[float]:
        """Wall time of each block."""
        return [float(notes["seconds"]) for notes in self._notes()]

    def _notes(self) -> Iterator[dict[str, str]]:
        for index in range(len(self._base.blocks)):
            yield self._folder.notes(block_file(index))


def block_file(index: int) -> str:
    """Name of the file that has a block's tensors and reports."""
    return f"block-{index:04d}"
