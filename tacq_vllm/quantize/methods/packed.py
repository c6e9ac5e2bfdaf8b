"""Linears of codes, with kept weights beside them: what the format can hold."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from typing import ClassVar

import torch
from torch import Tensor

from tacq_vllm.format.stored import Layout
from tacq_vllm.quantize.result import PackableResult
from tacq_vllm.quantize.rounder import GroupInputs, RoundedLinear
from tacq_vllm.quantize.world import World

Masks = Callable[[str], Tensor | None]
"""The weights that a linear keeps, bool [out, in], or None."""

QuantizeRows = Callable[[Tensor, Tensor | None, Tensor | None], PackableResult]
"""Quantizes rows [n, in], each without regard to the others, given the Hessian of their
inputs (None where inputs do not matter) and the mask of those kept."""


def keep_none(name: str) -> None:
    """Keep no weights of a linear: the `Masks` of a method without outliers."""
    return None


@dataclass(frozen=True)
class PackedRounder:
    """Quantizes the rows of a group as one matrix, of which each process has some."""

    quantize_rows: QuantizeRows
    layout: Layout
    group_size: int
    world: World
    masks: Masks = keep_none
    needs_inputs: bool = True

    sample_tokens: ClassVar[int] = 0

    @property
    def bits(self) -> int:
        """See `Rounder`."""
        return self.layout.bits

    def round_group(
        self, weights: Mapping[str, Tensor], inputs: GroupInputs | None
    ) -> dict[str, RoundedLinear]:
        """See `Rounder`."""
        masks = [self.masks(name) for name in weights]
        kept = [mask for mask in masks if mask is not None]
        stacked = self._quantize(
            torch.cat(list(weights.values())),
            inputs.H if inputs else None,
            torch.cat(kept) if kept else None,
        )
        rounded = {}
        start = 0
        for (name, W), mask in zip(weights.items(), masks, strict=True):
            rows = slice(start, start + W.shape[0])
            start = rows.stop
            result = stacked.map_rows(itemgetter(rows))
            if mask is None:
                mask = torch.zeros_like(W, dtype=torch.bool)
            tensors = result.pack(mask).tensors()
            rounded[name] = RoundedLinear(
                weight=result.weight,
                tensors=tensors,
                outliers=int(mask.sum()),
                stored_bytes=sum(tensor.nbytes for tensor in tensors.values()),
                damp_percent=result.damp_percent,
            )
        return rounded

    def _quantize(
        self, W: Tensor, H: Tensor | None, kept: Tensor | None
    ) -> PackableResult:
        own = self.world.rows(W.shape[0])
        part = self.quantize_rows(W[own], H, None if kept is None else kept[own])
        return part.map_rows(partial(self.world.gather_rows, count=W.shape[0]))
