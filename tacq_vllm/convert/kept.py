"""Which weights of a 16-bit model an imported checkpoint keeps.

There is no calibration text, so there are no gradients: the score is |W|·|Q - W|.
"""

import torch
from torch import Tensor

from tacq_vllm.convert.source import Source
from tacq_vllm.quantize.errors import QuantizeError
from tacq_vllm.quantize.selection import select_top
from tacq_vllm.quantize.weights import WeightFiles


class KeptWeights:
    """The share of all quantized weights with the highest scores.

    Raises:
        QuantizeError: the 16-bit model is not the one that was quantized.
    """

    def __init__(self, source: Source, base: WeightFiles, ratio: float) -> None:
        self._source = source
        self._base = base
        count = sum(linear.weight.numel() for linear in source.linears.values())
        self._selection = select_top(source.linears, self._scores, int(ratio * count))

    def original(self, name: str) -> Tensor:
        """The weight of a linear in the 16-bit model, in its type: [out, in].

        Raises:
            QuantizeError: the model lacks it, has another shape, or is not finite.
        """
        stored = f"{name}.weight"
        if stored not in self._base:
            raise QuantizeError(f"{stored}: the base model has no such tensor")
        weight = self._base.load(stored)
        shape = self._source.linears[name].weight.shape
        if weight.shape != shape:
            raise QuantizeError(
                f"{stored}: the base model has {list(weight.shape)}, the checkpoint "
                f"{list(shape)}"
            )
        if not bool(weight.isfinite().all()):
            raise QuantizeError(f"{stored}: a value of the base model is not finite")
        return weight

    def mask(self, name: str) -> Tensor:
        """The kept weights of a linear: bool [out, in]."""
        return self._selection.mask(name, self._scores(name))

    def _scores(self, name: str) -> Tensor:
        original = self.original(name).to(torch.float32)
        error = self._source.linear(name).dequantize() - original
        return original.abs() * error.abs()
