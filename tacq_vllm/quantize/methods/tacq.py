"""TaCQ (arXiv 2504.07389, section 3): the weights kept that matter most.

1. The whole model rounded without kept weights, by GPTQ, gives Q(W).
2. Gradients of the 16-bit model on the calibration text give |∂L/∂W|.
3. One budget picks the weights with the highest score.
4. Rounding again, those weights out of the grid and kept in 16 bits, gives the
   checkpoint.
"""

from collections.abc import Callable

from torch import Tensor

from tacq_vllm.quantize.depends import Depends
from tacq_vllm.quantize.methods import gptq
from tacq_vllm.quantize.methods.packed import Masks
from tacq_vllm.quantize.methods.rounding import Rounding
from tacq_vllm.quantize.passes import Gradients, Passes, check_linears
from tacq_vllm.quantize.quantized import QuantizedBlocks
from tacq_vllm.quantize.saliency import (
    gradient_power,
    needs_gradients,
    needs_quantized,
    saliency,
)
from tacq_vllm.quantize.selection import select_top
from tacq_vllm.quantize.workdir import fingerprint


def quantize(passes: Passes) -> QuantizedBlocks:
    """GPTQ, the weights of the highest saliency kept."""
    check_linears(passes.base, passes.recipe.group_size)
    return quantize_keeping(passes, gptq.rounding(passes))


def quantize_keeping(passes: Passes, rounding: Rounding) -> QuantizedBlocks:
    """Round, the weights of the highest saliency kept; plainly where none fits."""
    outliers = passes.recipe.outliers
    budget = int(outliers.ratio * passes.num_weights())
    if budget == 0:
        return rounding.quantize(passes)
    metric = outliers.saliency
    chosen: Depends = outliers.model_dump(mode="json")
    plain: QuantizedBlocks | None = None
    gradients: Gradients | None = None
    if needs_quantized(metric):
        plain = rounding.quantize(passes, "plain quantization")
        chosen["plain"] = fingerprint(passes.text_depends() | rounding.depends)
    if needs_gradients(metric):
        gradients = passes.gradients(gradient_power(metric))
        chosen["gradients"] = gradients.fingerprint

    def scores(name: str) -> Tensor:
        W = passes.base.weight(name)
        return saliency(
            metric,
            W,
            gradients.load(name) if gradients else W,
            plain.weight(name) if plain else W,
        )

    masks = _select(passes, scores, budget)
    return rounding.quantize(passes, "quantization", masks, chosen)


def _select(passes: Passes, scores: Callable[[str], Tensor], budget: int) -> Masks:
    outliers = passes.recipe.outliers
    if outliers.scope == "model":
        selection = select_top(passes.base.linears(), scores, budget)
        return lambda name: selection.mask(name, scores(name))

    def mask(name: str) -> Tensor:
        values = scores(name)
        count = int(outliers.ratio * values.numel())
        return select_top([name], lambda _: values, count).mask(name, values)

    return mask
