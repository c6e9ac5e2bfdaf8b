"""Rounding to nearest: each weight by itself, on GPTQ's grids; needs no text."""

import torch
from torch import Tensor

from tacq_vllm.config import GptqConfig
from tacq_vllm.format.linear import PlanesLayout
from tacq_vllm.quantize.grid import GRID_SETTINGS, fit_grid
from tacq_vllm.quantize.methods.packed import PackedRounder
from tacq_vllm.quantize.passes import Passes, check_linears
from tacq_vllm.quantize.quantized import QuantizedBlocks
from tacq_vllm.quantize.result import GridResult


def quantize(passes: Passes) -> QuantizedBlocks:
    """Round every linear to nearest."""
    recipe = passes.recipe
    check_linears(passes.base, recipe.group_size)

    def quantize_rows(W: Tensor, H: Tensor | None, kept: Tensor | None) -> GridResult:
        return round_to_nearest(
            W, recipe.bits, recipe.group_size, passes.dtype, recipe.gptq
        )

    rounder = PackedRounder(
        quantize_rows,
        PlanesLayout(recipe.bits),
        recipe.group_size,
        passes.world,
        needs_inputs=False,
    )
    depends = {
        "bits": recipe.bits,
        "group_size": recipe.group_size,
        "dtype": passes.dtype_name,
        "grid": recipe.gptq.model_dump(mode="json", include=GRID_SETTINGS),
    }
    return passes.blocks("rtn", "quantization", rounder, depends)


def round_to_nearest(
    W: Tensor, bits: int, group_size: int, dtype: torch.dtype, config: GptqConfig
) -> GridResult:
    """Round each weight to the nearest value of its group's grid.

    Args:
        W: float32 [out, in].
        bits: bits of a code.
        group_size: columns of a grid, or -1.
        dtype: the 16-bit type of scales.
        config: the grid search.

    Raises:
        QuantizeError: a row has no grid that the 16-bit type can hold.
    """
    groups = W.split(W.shape[1] if group_size == -1 else group_size, dim=1)
    grids = [fit_grid(group, None, bits, dtype, config) for group in groups]
    wide = [grid.over_columns() for grid in grids]
    codes = [grid.codes(group) for grid, group in zip(wide, groups, strict=True)]
    values = [grid.values(code) for grid, code in zip(wide, codes, strict=True)]
    return GridResult(
        codes=torch.cat(codes, 1).to(torch.uint8),
        zeros=torch.stack([grid.zeros for grid in grids], 1).to(torch.uint8),
        scales=torch.stack([grid.scales for grid in grids], 1).to(dtype),
        weight=torch.cat(values, 1),
        bits=bits,
        damp_percent=None,
    )
