"""SqueezeLLM (arXiv 2306.07629): each row its own values, where errors cost most.

Values are centers of a k-means that counts each weight by its Fisher information, the
square of its gradient (section 4.1). The weights with the highest Fisher information,
and those far out, stay in 16 bits (section 4.2).
"""

import torch
from torch import Tensor

from tacq_vllm.config_methods import SqueezeLlmConfig
from tacq_vllm.quantize.kmeans import nearest_centers, weighted_kmeans
from tacq_vllm.quantize.methods.simulated import SimulatedRounder
from tacq_vllm.quantize.passes import Passes, check_linears
from tacq_vllm.quantize.quantized import QuantizedBlocks
from tacq_vllm.quantize.result import SimulatedResult, sparse_bits
from tacq_vllm.quantize.rounder import GroupInputs
from tacq_vllm.quantize.selection import select_top


def quantize(passes: Passes) -> QuantizedBlocks:
    """Gradients of the 16-bit model, then every linear by itself."""
    recipe, base, world = passes.recipe, passes.base, passes.world
    config = recipe.squeezellm
    check_linears(passes.base, -1)
    fisher = passes.gradients(power=2)
    budget = int(config.outlier_ratio * passes.num_weights())
    far_out = select_top(
        base.linears(), lambda name: distance_from_quartiles(base.weight(name)), budget
    )

    def quantize_linear(
        name: str, W: Tensor, inputs: GroupInputs | None
    ) -> SimulatedResult:
        squares = fisher.load(name)
        kept = far_out.mask(name, distance_from_quartiles(W))
        kept |= most_sensitive(squares, config.sensitive_ratio)
        own = world.rows(W.shape[0])
        rows = quantize_rows(
            W[own], squares[own], kept[own], recipe.bits, passes.dtype, config
        )
        outliers = int(kept.sum())
        return SimulatedResult(
            weight=world.gather_rows(rows, W.shape[0]),
            outliers=outliers,
            stored_bits=stored_bits(W.shape[0], W.shape[1], recipe.bits, outliers),
        )

    rounder = SimulatedRounder(
        quantize_linear, recipe.bits, -1, passes.dtype, needs_inputs=False
    )
    depends = {
        "bits": recipe.bits,
        "dtype": passes.dtype_name,
        "squeezellm": config.model_dump(mode="json"),
        "fisher": fisher.fingerprint,
    }
    return passes.blocks("squeezellm", "quantization", rounder, depends)


def distance_from_quartiles(W: Tensor) -> Tensor:
    """How far |W| lies beyond the quartiles, in interquartile ranges: [out, in].

    A threshold T = max |Q ± r·IQR| lets those pass whose distance is r or more.
    """
    flat = W.flatten()
    low, high = (flat.kthvalue(_rank(flat.numel(), q)).values for q in (0.25, 0.75))
    spread = (high - low).clamp(min=torch.finfo(W.dtype).tiny)
    return ((W.abs() - torch.maximum(-low, high)) / spread).clamp(min=0.0)


def most_sensitive(fisher: Tensor, ratio: float) -> Tensor:
    """The share of weights with the highest Fisher information: bool [out, in]."""
    count = int(ratio * fisher.numel())
    selection = select_top(["linear"], lambda _: fisher, count)
    return selection.mask("linear", fisher)


def quantize_rows(
    W: Tensor,
    fisher: Tensor,
    kept: Tensor,
    bits: int,
    dtype: torch.dtype,
    config: SqueezeLlmConfig,
) -> Tensor:
    """Give each weight the nearest of its row's 2**bits values.

    Args:
        W: float32 [rows, in].
        fisher: float32 [rows, in], zero or more.
        kept: bool [rows, in]: they keep their value, and do not count.
        bits: bits of a code.
        dtype: the 16-bit type of values and kept weights.
        config: iterations of k-means.

    Returns:
        float32 [rows, in].
    """
    # As zeros without weight, where the dense part has them.
    dense = W.masked_fill(kept, 0.0)
    counted = fisher.masked_fill(kept, 0.0)
    centers = weighted_kmeans(dense, counted, 2**bits, config.iterations)
    centers = centers.to(dtype).float()
    return torch.where(kept, W.to(dtype).float(), nearest_centers(W, centers))


def stored_bits(out_features: int, in_features: int, bits: int, outliers: int) -> int:
    """Bits of codes, tables of 16-bit values, and kept weights."""
    codes = bits * out_features * in_features
    tables = 16 * (1 << bits) * out_features
    return codes + tables + sparse_bits(out_features, outliers)


def _rank(count: int, quantile: float) -> int:
    """The rank, from 1, next to a quantile of `count` values."""
    return 1 + round(quantile * (count - 1))
