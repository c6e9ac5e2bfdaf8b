"""SliM-LLM's grids of a group of columns, from one bit on (section 3.3)."""

from collections.abc import Callable

import torch
from torch import Tensor

from tacq_vllm.config_methods import SlimLlmConfig
from tacq_vllm.quantize.grid import Grid

RoundValues = Callable[[Tensor], Tensor]
"""The values of a grid next to weights, [out, n]."""


def fit_group(
    W: Tensor,
    factor: Tensor,
    bits: int,
    dtype: torch.dtype,
    config: SlimLlmConfig,
    norm: float,
) -> RoundValues:
    """Search each row's grid, of ranges around its own; one bit needs no search.

    Args:
        W: float32 [out, n], a group of columns.
        factor: float32 [n], the diagonal of the inverse Hessian's factor.
        bits: bits of a code.
        dtype: the 16-bit type of scales.
        config: which elements are salient, and how far ranges are changed.
        norm: exponent of the rounding error.
    """
    if bits == 1:
        return fit_binary(W, dtype)
    weights = torch.where(
        salient_elements((W / factor).square(), config.salience_deviations),
        config.salience_weight,
        1.0,
    )
    steps = torch.arange(config.search_steps + 1) / config.search_steps
    changes = config.search_range * torch.cat([steps, -steps[1:]])
    best = _range_grid(W, 1.0, bits, dtype)
    best_error = torch.full_like(best.scales, torch.inf)
    for change in changes.tolist():
        grid = _range_grid(W, 1.0 + change, bits, dtype)
        error = (grid.values(grid.codes(W)) - W).abs_().pow_(norm).mul_(weights)
        error = error.sum(1, keepdim=True)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        scales = torch.where(better, grid.scales, best.scales)
        best = Grid(scales, torch.where(better, grid.zeros, best.zeros), grid.max_code)
    return lambda w: best.values(best.codes(w))


def salient_elements(salience: Tensor, deviations: float) -> Tensor:
    """Elements so many standard deviations above the mean: bool [out, n]."""
    return salience > salience.mean() + deviations * salience.std()


def fit_binary(W: Tensor, dtype: torch.dtype) -> RoundValues:
    """Fit to W [out, n] each row's mean ± its mean absolute value: 1 bit."""
    means, sizes = (
        values.mean(1, keepdim=True).to(dtype).float() for values in (W, W.abs())
    )
    return lambda w: (w - means).sign_().mul_(sizes).add_(means)


def fit_simply(W: Tensor, bits: int) -> RoundValues:
    """Fit to W [out, n] each row's whole range, not searched and in full precision."""
    if bits == 1:
        return fit_binary(W, torch.float32)
    grid = _range_grid(W, 1.0, bits, torch.float32)
    return lambda w: grid.values(grid.codes(w))


def _range_grid(W: Tensor, share: float, bits: int, dtype: torch.dtype) -> Grid:
    """The grid of a share of each row's range, which has zero in it: over columns."""
    low, high = W.amin(1).clamp(max=0.0), W.amax(1).clamp(min=0.0)
    empty = low == high
    low, high = low.masked_fill(empty, -1.0), high.masked_fill(empty, 1.0)
    max_code = 2**bits - 1
    scales = (high - low) / max_code
    zeros = (-low / scales).round_()
    scales = (share * scales).to(dtype).float()
    return Grid(scales, zeros, max_code).over_columns()
