"""TaCQ (arXiv 2504.07389, section 3): GPTQ with the weights kept that matter most.

1. GPTQ of the whole model without kept weights gives Q(W).
2. Gradients of the 16-bit model on the calibration text give |∂L/∂W|.
3. One budget picks the weights with the highest score.
4. GPTQ again, those weights out of the grid and kept in 16 bits, gives the checkpoint.
"""

from collections.abc import Callable

from torch import Tensor

from tacq_vllm.quantize.depends import Depends
from tacq_vllm.quantize.layerwise import QuantizedBlocks
from tacq_vllm.quantize.methods import gptq
from tacq_vllm.quantize.methods.packed import Masks, keep_none
from tacq_vllm.quantize.passes import Gradients, Passes
from tacq_vllm.quantize.saliency import (
    gradient_power,
    needs_gradients,
    needs_quantized,
    saliency,
)
from tacq_vllm.quantize.selection import select_top
from tacq_vllm.quantize.workdir import fingerprint


def quantize(passes: Passes) -> QuantizedBlocks:
    """GPTQ, the weights of the highest saliency kept; plain GPTQ where none fits."""
    outliers = passes.recipe.outliers
    budget = int(outliers.ratio * passes.num_weights())
    if budget == 0:
        return gptq.quantize(passes)
    passes.check_linears(passes.recipe.group_size)
    metric = outliers.saliency
    plain_depends = gptq.depends(passes)
    chosen: Depends = outliers.model_dump(mode="json")
    plain: QuantizedBlocks | None = None
    gradients: Gradients | None = None
    if needs_quantized(metric):
        plain = gptq.quantize_blocks(
            passes, "plain quantization", keep_none, plain_depends
        )
        chosen["plain"] = fingerprint(passes.text_depends() | plain_depends)
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
    return gptq.quantize_blocks(
        passes, "quantization", masks, plain_depends | {"outliers": chosen}
    )


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
