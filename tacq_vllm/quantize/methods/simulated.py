"""Linears whose parts the format cannot hold: their values, in 16 bits."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tacq_vllm.quantize.errors import QuantizeError
from tacq_vllm.quantize.result import SimulatedResult
from tacq_vllm.quantize.rounder import GroupInputs, RoundedLinear

QuantizeLinear = Callable[[str, Tensor, GroupInputs | None], SimulatedResult]
"""Quantizes one linear, given its name, its weight float32 [out, in], and its inputs
where they matter. What it gives is the same in every process."""


@dataclass(frozen=True)
class SimulatedRounder:
    """Quantizes the linears of a group one by one, and stores their values."""

    quantize_linear: QuantizeLinear
    bits: int
    group_size: int
    dtype: torch.dtype
    """The 16-bit type of the values."""
    needs_inputs: bool = True
    sample_tokens: int = 0

    layout: ClassVar[None] = None

    def round_group(
        self, weights: Mapping[str, Tensor], inputs: GroupInputs | None
    ) -> dict[str, RoundedLinear]:
        """See `Rounder`."""
        return {name: self._round(name, W, inputs) for name, W in weights.items()}

    def _round(self, name: str, W: Tensor, inputs: GroupInputs | None) -> RoundedLinear:
        result = self.quantize_linear(name, W, inputs)
        stored = result.weight.to(self.dtype)
        if not bool(stored.isfinite().all()):
            raise QuantizeError(f"{name}: a weight is not finite in {self.dtype}")
        return RoundedLinear(
            weight=stored.to(torch.float32),
            tensors={"weight": stored},
            outliers=result.outliers,
            stored_bytes=-(-result.stored_bits // 8),
            damp_percent=result.damp_percent,
        )
