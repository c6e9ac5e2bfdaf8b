"""Rounding a whole model, with or without weights that are kept in 16 bits."""

from collections.abc import Callable
from dataclasses import dataclass

from tacq_vllm.quantize.depends import Depends
from tacq_vllm.quantize.methods.packed import Masks, PackedRounder, keep_none
from tacq_vllm.quantize.passes import Passes
from tacq_vllm.quantize.quantized import QuantizedBlocks


@dataclass(frozen=True)
class Rounding:
    """A way to round linears, whichever of their weights are kept."""

    name: str
    """Of the folders in the work folder."""
    rounder: Callable[[Masks], PackedRounder]
    depends: Depends
    """What it depends on without kept weights, beside model and text."""

    def quantize(
        self,
        passes: Passes,
        phase: str = "quantization",
        masks: Masks = keep_none,
        chosen: Depends | None = None,
    ) -> QuantizedBlocks:
        """Round all linears.

        Args:
            passes: the model, and where results are kept.
            phase: what it is called while it runs.
            masks: the weights that are kept.
            chosen: what their choice depends on; None: none are kept.
        """
        kept = {} if chosen is None else {"outliers": chosen}
        depends = {**self.depends, **kept}
        return passes.blocks(self.name, phase, self.rounder(masks), depends)
