"""FineQ (arXiv 2504.19746): clusters of three weights, outliers with more bits.

To the nearest codes, as the paper; or, which is ours, with GPTQ's compensation, with
TaCQ's weights kept in 16 bits beside the clusters, or with both.
"""

from torch import Tensor

from tacq_vllm.format.clustered import ClusteredLayout
from tacq_vllm.quantize.clusters import round_to_clusters
from tacq_vllm.quantize.clusters_gptq import compensate_clusters
from tacq_vllm.quantize.grid import GRID_SETTINGS
from tacq_vllm.quantize.methods.packed import Masks, PackedRounder
from tacq_vllm.quantize.methods.rounding import Rounding
from tacq_vllm.quantize.methods.tacq import quantize_keeping
from tacq_vllm.quantize.passes import Passes, check_linears
from tacq_vllm.quantize.quantized import QuantizedBlocks
from tacq_vllm.quantize.result import ClusterResult


def quantize(passes: Passes) -> QuantizedBlocks:
    """Round every linear to clusters."""
    check_linears(passes.base, passes.recipe.group_size)
    rounding = _rounding(passes)
    if passes.recipe.fineq.keep_outliers:
        return quantize_keeping(passes, rounding)
    return rounding.quantize(passes)


def _rounding(passes: Passes) -> Rounding:
    recipe = passes.recipe
    compensates = recipe.fineq.rounding == "gptq"

    def quantize_rows(
        W: Tensor, H: Tensor | None, kept: Tensor | None
    ) -> ClusterResult:
        if H is None:
            return round_to_clusters(
                W, kept, recipe.group_size, passes.dtype, recipe.gptq
            )
        return compensate_clusters(
            W,
            H,
            kept,
            group_size=recipe.group_size,
            dtype=passes.dtype,
            keep_original=recipe.outliers.kept_value == "original",
            config=recipe.gptq,
        )

    def rounder(masks: Masks) -> PackedRounder:
        return PackedRounder(
            quantize_rows,
            ClusteredLayout(),
            recipe.group_size,
            passes.world,
            masks,
            needs_inputs=compensates,
        )

    return Rounding(
        name="fineq",
        rounder=rounder,
        depends={
            "group_size": recipe.group_size,
            "dtype": passes.dtype_name,
            "rounding": recipe.fineq.rounding,
            "gptq": recipe.gptq.model_dump(
                mode="json", include=None if compensates else GRID_SETTINGS
            ),
        },
    )
