"""SpQR's grids: of small groups, their statistics on grids of their own."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tacq_vllm.config_methods import SpqrConfig


@dataclass(frozen=True)
class RangeGrid:
    """Evenly spaced values whose zero-point need not be an integer."""

    scales: Tensor
    """float32 [..., 1]."""
    zeros: Tensor
    """float32 [..., 1]."""
    max_code: int

    def round(self, W: Tensor) -> Tensor:
        """The nearest values, of W [..., n]."""
        tiny = torch.finfo(W.dtype).tiny
        codes = (W / self.scales.clamp(min=tiny) + self.zeros).round_()
        return codes.clamp_(0, self.max_code).sub_(self.zeros).mul_(self.scales)


def fit_range(W: Tensor, bits: int) -> RangeGrid:
    """A grid from the least to the largest of W [..., n]; of equal ones, -1 to 1."""
    low, high = W.amin(-1, keepdim=True), W.amax(-1, keepdim=True)
    flat = low == high
    low, high = low.masked_fill(flat, -1.0), high.masked_fill(flat, 1.0)
    scales = (high - low) / (2**bits - 1)
    return RangeGrid(scales, -low / scales, 2**bits - 1)


def round_statistics(
    values: Tensor, bits: int, group_size: int, dtype: torch.dtype
) -> Tensor:
    """Round one statistic of all rows, [out, 1], on a 16-bit grid for some together."""
    count = values.shape[0]
    groups = -(-count // group_size)
    missing = groups * group_size - count
    filler = values[-1:].expand(missing, 1)
    padded = torch.cat([values, filler]).view(groups, group_size)
    grid = fit_range(padded, bits)
    stored = RangeGrid(
        grid.scales.to(dtype).float(), grid.zeros.to(dtype).float(), grid.max_code
    )
    return stored.round(padded).view(-1, 1)[:count]


def leave_one_out_gain(W: Tensor, weights: Tensor, bits: int) -> Tensor:
    """How much less error a group has if one weight need not be rounded: [out, n].

    Args:
        W: float32 [out, n], a group of columns.
        weights: float32 [n], of the columns' squared errors.
        bits: bits of a code.
    """
    n = W.shape[1]
    one_out = ~torch.eye(n, dtype=torch.bool, device=W.device)
    others = torch.arange(n, device=W.device).expand(n, n)[one_out].view(n, n - 1)
    rest = W[:, others]
    after = (fit_range(rest, bits).round(rest) - rest).square() * weights[others]
    before = (fit_range(W, bits).round(W) - W).square() * weights
    return before.sum(-1, keepdim=True) - after.sum(-1)


def fit_group(
    W: Tensor,
    weights: Tensor,
    threshold: float,
    bits: int,
    dtype: torch.dtype,
    config: SpqrConfig,
) -> RangeGrid:
    """The grid of a group of columns, its likely outliers left out.

    Args:
        W: float32 [out, n].
        weights: float32 [n], of the columns' squared errors.
        threshold: squared error that makes an outlier.
        bits: bits of a code.
        dtype: the 16-bit type of the statistics' own scales and zero-points.
        config: how statistics are quantized.
    """
    if threshold < math.inf:
        likely = leave_one_out_gain(W, weights, bits) > threshold
        others = (~likely).sum(1, keepdim=True).clamp(min=1)
        means = W.masked_fill(likely, 0.0).sum(1, keepdim=True) / others
        W = torch.where(likely, means, W)
    grid = fit_range(W, bits)
    scales, zeros = (
        round_statistics(
            values, config.statistics_bits, config.statistics_group_size, dtype
        )
        for values in (grid.scales, grid.zeros)
    )
    return RangeGrid(scales, zeros, grid.max_code)
