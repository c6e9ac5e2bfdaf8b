"""GPTQ (arXiv 2210.17323): rounding whose errors later columns make up for."""

import torch
from torch import Tensor

from tacq_vllm.config import Recipe
from tacq_vllm.format.linear import PlanesLayout
from tacq_vllm.quantize.gptq import quantize_matrix
from tacq_vllm.quantize.methods.packed import Masks, PackedRounder
from tacq_vllm.quantize.methods.rounding import Rounding
from tacq_vllm.quantize.passes import Passes, check_linears
from tacq_vllm.quantize.quantized import QuantizedBlocks
from tacq_vllm.quantize.result import GridResult
from tacq_vllm.quantize.world import World


def quantize(passes: Passes) -> QuantizedBlocks:
    """GPTQ without kept weights."""
    check_linears(passes.base, passes.recipe.group_size)
    return rounding(passes).quantize(passes)


def rounding(passes: Passes) -> Rounding:
    """GPTQ of the whole model, with the kept weights out of its grids."""
    recipe = passes.recipe
    return Rounding(
        name="gptq",
        rounder=lambda masks: gptq_rounder(recipe, passes.dtype, masks, passes.world),
        depends={
            "bits": recipe.bits,
            "group_size": recipe.group_size,
            "dtype": passes.dtype_name,
            "gptq": recipe.gptq.model_dump(mode="json"),
        },
    )


def gptq_rounder(
    recipe: Recipe, dtype: torch.dtype, masks: Masks, world: World
) -> PackedRounder:
    """GPTQ of a group of linears as the recipe has it."""

    def quantize_rows(W: Tensor, H: Tensor | None, kept: Tensor | None) -> GridResult:
        assert H is not None
        return quantize_matrix(
            W,
            H,
            kept,
            bits=recipe.bits,
            group_size=recipe.group_size,
            dtype=dtype,
            keep_original=recipe.outliers.kept_value == "original",
            config=recipe.gptq,
        )

    layout = PlanesLayout(recipe.bits)
    return PackedRounder(quantize_rows, layout, recipe.group_size, world, masks)
