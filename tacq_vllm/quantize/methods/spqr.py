"""SpQR (arXiv 2306.03078): small groups, their statistics quantized too, and outliers.

GPTQ in the order of the largest inputs, on grids between the least and the largest
weight of each small group; scales and zero-points of several rows share grids of their
own. A weight stays in 16 bits where rounding it would cost too much (section 4).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from tacq_vllm.config import Recipe
from tacq_vllm.config_methods import SpqrConfig
from tacq_vllm.quantize.columns import lazy_block, round_columns
from tacq_vllm.quantize.gptq import inverse_factor
from tacq_vllm.quantize.methods.simulated import SimulatedRounder
from tacq_vllm.quantize.methods.spqr_grid import RangeGrid, fit_group
from tacq_vllm.quantize.passes import Passes, check_linears
from tacq_vllm.quantize.quantized import QuantizedBlocks
from tacq_vllm.quantize.result import SimulatedResult, sparse_bits
from tacq_vllm.quantize.rounder import GroupInputs
from tacq_vllm.quantize.world import World

_SEARCH_ROWS = 128
"""Rows on which a threshold is tried; no row depends on another of another group."""

_BLOCK_SIZE = 128
"""Columns per lazy update: for speed, the result is the same."""

_SEARCH_RANGE = (1e-3, 1e2)
_SEARCH_STEPS = 8


def quantize(passes: Passes) -> QuantizedBlocks:
    """Every linear by itself, on what those before it produce."""
    recipe = passes.recipe
    config, bits = recipe.spqr, code_bits(recipe)
    check_linears(passes.base, config.group_size)

    def quantize_linear(
        name: str, W: Tensor, inputs: GroupInputs | None
    ) -> SimulatedResult:
        assert inputs is not None
        return quantize_matrix(W, inputs.H, bits, passes.dtype, config, passes.world)

    rounder = SimulatedRounder(quantize_linear, bits, config.group_size, passes.dtype)
    depends = {
        "bits": bits,
        "dtype": passes.dtype_name,
        "spqr": config.model_dump(mode="json"),
    }
    return passes.blocks("spqr", "quantization", rounder, depends)


def code_bits(recipe: Recipe) -> int:
    """Bits of a code: one less than the recipe's, where it does not say."""
    return recipe.spqr.code_bits or recipe.bits - 1


@dataclass(frozen=True)
class _Rows:
    weight: Tensor
    """float32 [rows, in]."""
    kept: Tensor
    """bool [rows, in]."""


def quantize_rows(
    W: Tensor,
    U: Tensor,
    order: Tensor,
    threshold: float,
    bits: int,
    dtype: torch.dtype,
    config: SpqrConfig,
) -> _Rows:
    """Round rows; whole groups of rows whose statistics share grids.

    Args:
        W: float32 [rows, in].
        U: float32 [in, in], as in `round_columns`.
        order: int64 [in].
        threshold: squared error that makes an outlier.
        bits: bits of a code.
        dtype: the 16-bit type of outliers and of the statistics' grids.
        config: groups and statistics.
    """
    size = config.group_size
    weights = U.diagonal().square().reciprocal()
    kept = torch.zeros(W.shape[1], W.shape[0], dtype=torch.bool, device=W.device)
    grid: RangeGrid | None = None

    def round_column(step: int, rest: Tensor) -> Tensor:
        nonlocal grid
        if step % size == 0:
            group = slice(step, step + size)
            grid = fit_group(
                rest[group].T, weights[group], threshold, bits, dtype, config
            )
        assert grid is not None
        w = rest[step]
        value = grid.round(w.unsqueeze(1)).squeeze(1)
        kept[step] = (w - value).square() * weights[step] > threshold
        return torch.where(kept[step], w.to(dtype).float(), value)

    block_size = lazy_block(_BLOCK_SIZE, size, W.shape[1])
    weight = round_columns(W, U, order, block_size, round_column)
    return _Rows(weight, kept.T)


def quantize_matrix(
    W: Tensor,
    H: Tensor,
    bits: int,
    dtype: torch.dtype,
    config: SpqrConfig,
    world: World,
) -> SimulatedResult:
    """Quantize one linear, of which each process works on some rows.

    Args:
        W: float32 [out, in].
        H: float32 [in, in], from `Hessian.mean`.
        bits: bits of a code.
        dtype: the 16-bit type of outliers and of the statistics' grids.
        config: groups, statistics, outliers, damping.
        world: the processes.

    Raises:
        QuantizeError: the Hessian stays singular, or is not finite.
    """
    order = H.diagonal().argsort(descending=True, stable=True)
    U, damp_percent = inverse_factor(H[order][:, order], config.damp_percent)
    run = partial(
        quantize_rows, U=U, order=order, bits=bits, dtype=dtype, config=config
    )
    unit = float((W[:, order].double().var(0) / U.diagonal().square()).mean())

    def share(rows: Tensor, threshold: float) -> float:
        return float(run(rows, threshold=threshold * unit).kept.float().mean())

    multiple = config.statistics_group_size
    threshold = config.outlier_threshold
    if threshold is None:
        rows = _spread_rows(W.shape[0], multiple).to(W.device)
        threshold = search_threshold(partial(share, W[rows]), config.outlier_ratio)
    own = run(W[world.rows(W.shape[0], multiple)], threshold=threshold * unit)
    gather = partial(world.gather_rows, count=W.shape[0], multiple=multiple)
    outliers = int(gather(own.kept.to(torch.uint8)).sum())
    return SimulatedResult(
        weight=gather(own.weight),
        outliers=outliers,
        stored_bits=stored_bits(W.shape[0], W.shape[1], bits, outliers, config),
        damp_percent=damp_percent,
    )


def search_threshold(share: Callable[[float], float], ratio: float) -> float:
    """The threshold at which about this share of the weights are outliers.

    Args:
        share: outliers among the weights at a threshold; falls as that rises.
        ratio: the share that is wanted; none at all where it is 0.
    """
    if ratio == 0.0:
        return math.inf
    low, high = _SEARCH_RANGE
    for _ in range(_SEARCH_STEPS):
        middle = math.sqrt(low * high)
        if share(middle) > ratio:
            low = middle
        else:
            high = middle
    return high


def stored_bits(
    out_features: int, in_features: int, bits: int, outliers: int, config: SpqrConfig
) -> int:
    """Bits of codes, statistics with their grids, column order, and outliers."""
    codes = bits * out_features * in_features
    groups = in_features // config.group_size
    statistics = 2 * config.statistics_bits * out_features * groups
    # A scale and a zero-point for the scales, and the same for the zero-points.
    shared = -(-out_features // config.statistics_group_size) * groups
    grids = 4 * 16 * shared
    order = 16 * in_features
    return codes + statistics + grids + order + sparse_bits(out_features, outliers)


def _spread_rows(count: int, multiple: int) -> Tensor:
    """Some groups of rows from all over a matrix: int64."""
    rows = torch.arange(count)
    groups = list(rows.split(multiple))
    stride = -(-count // _SEARCH_ROWS)
    return torch.cat(groups[::stride])
