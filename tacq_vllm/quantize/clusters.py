"""Rounding a weight to FineQ's clusters of three (arXiv 2504.19746).

A scale is searched per row, or per group of columns; given a scale, every pair of
clusters takes whichever of the four indices leaves the least error. So a cluster counts
as one with an outlier where a weight is large against the scale, and it is the smallest
weight that is zeroed.

A weight that is kept in 16 bits has code 0, which every index allows: here it is zero.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from tacq_vllm.config import GptqConfig
from tacq_vllm.format.clusters import CLUSTER, NARROW, PAIR, WIDE, Clusters
from tacq_vllm.quantize.errors import check_finite
from tacq_vllm.quantize.result import ClusterResult

_CHUNK_WEIGHTS = 1 << 16
"""Weights searched at a time, so that the loop works in cache."""

_COARSE = 4
"""Every so many scales are tried first."""


def round_to_clusters(
    W: Tensor,
    kept: Tensor | None,
    group_size: int,
    dtype: torch.dtype,
    config: GptqConfig,
) -> ClusterResult:
    """Round a weight to the nearest codes on the best scales.

    Args:
        W: float32 [out, in].
        kept: bool [out, in], the weights to store in 16 bits, or None.
        group_size: columns that share a scale, or -1.
        dtype: the 16-bit type of scales and kept weights.
        config: number of steps, smallest shrink factor, norm of the error.

    Raises:
        QuantizeError: a scale or a kept weight does not fit the 16-bit type.
    """
    coded = W if kept is None else W.masked_fill(kept, 0.0)
    scales = fit_scales(coded, None, group_size, dtype, config)
    size = W.shape[1] // scales.shape[1]
    spread = scales.repeat_interleave(size, dim=1)
    rows = max(1, _CHUNK_WEIGHTS // W.shape[1])
    parts = [
        round_on_scales(units, config.grid_norm)
        for units in (coded / spread).split(rows)
    ]
    clusters = Clusters(
        torch.cat([part.codes for part in parts]),
        torch.cat([part.indices for part in parts]),
    )
    exact = (W - coded).to(dtype).to(torch.float32)
    return cluster_result(clusters, scales, exact, dtype, None)


def fit_scales(
    W: Tensor,
    weights: Tensor | None,
    group_size: int,
    dtype: torch.dtype,
    config: GptqConfig,
) -> Tensor:
    """The scale of each row, or group of its columns, that leaves the least error.

    Args:
        W: float32 [out, in]; zero where a weight is kept.
        weights: float32 [in], of the columns' errors; None: all count the same.
        group_size: columns that share a scale, a multiple of 6, or -1.
        dtype: the 16-bit type that scales are stored in.
        config: number of steps, smallest shrink factor, norm of the error.

    Returns:
        float32 [out, groups], representable in `dtype`, of either sign, never zero.

    Raises:
        QuantizeError: as `search_scales`.
    """
    size = W.shape[1] if group_size == -1 else group_size
    rows = max(1, _CHUNK_WEIGHTS // size)
    found = []
    for first in range(0, W.shape[1], size):
        own = None if weights is None else weights[first : first + size]
        chunks = W[:, first : first + size].split(rows)
        scales = [search_scales(chunk, own, dtype, config) for chunk in chunks]
        found.append(torch.cat(scales))
    return torch.stack(found, 1)


def round_on_scales(units: Tensor, norm: float) -> Clusters:
    """Codes and indices of least error.

    Args:
        units: weights over their scales, float32 [rows, n].
        norm: exponent of the error.
    """
    grouped = _pairs(units)
    indices = _index_errors(grouped, None, norm).argmin(-1)
    is_narrow = (indices == 0)[..., None, None]
    places = torch.arange(1, CLUSTER + 1, device=units.device)
    nearest = grouped.round()
    codes = torch.where(is_narrow, nearest.clamp(*NARROW), nearest.clamp(*WIDE))
    codes.masked_fill_(indices[..., None, None] == places, 0.0)
    codes = codes.flatten(1)[:, : units.shape[1]]
    return Clusters(codes.to(torch.int8), indices.to(torch.uint8))


def search_scales(
    W: Tensor, weights: Tensor | None, dtype: torch.dtype, config: GptqConfig
) -> Tensor:
    """The scale of each row that leaves the least error.

    From the largest weight at code 1 the scales fall geometrically to the one that puts
    it, shrunk as far as the configuration allows, at the widest code. Both signs are
    tried: one side of the range is longer.

    Args:
        W: float32 [rows, n].
        weights: float32 [n], of the columns' errors; None: all count the same.
        dtype: the 16-bit type that scales are stored in.
        config: number of steps, smallest shrink factor, norm of the error.

    Returns:
        float32 [rows], representable in `dtype`, never zero.

    Raises:
        QuantizeError: a row has no scale that the 16-bit type can hold.
    """
    largest = W.abs().amax(1)
    smallest_factor = (1 - config.grid_max_shrink) / -WIDE[0]
    grouped = _pairs(W)
    spread = None if weights is None else _pairs(weights.unsqueeze(0))
    best_error = torch.full_like(largest, torch.inf)
    best_step = torch.zeros_like(largest)
    best = torch.ones_like(largest)

    def attempt(step: Tensor, sign: Tensor | float) -> None:
        nonlocal best_error, best_step, best
        step = step.clamp(0, config.grid_steps - 1)
        factor = smallest_factor ** (step / max(1, config.grid_steps - 1))
        scales = (sign * largest * factor).to(dtype).to(torch.float32)
        # A row of zeros, or one that the 16-bit type cannot scale, has only code 0.
        scales = torch.where(scales.abs() > 0, scales, 1.0)
        units = grouped / scales[:, None, None, None]
        errors = _index_errors(units, spread, config.grid_norm).amin(-1).sum(1)
        errors *= scales.abs() ** config.grid_norm
        better = errors < best_error
        best_error = torch.where(better, errors, best_error)
        best_step = torch.where(better, step, best_step)
        best = torch.where(better, scales, best)

    for step in range(0, config.grid_steps, _COARSE):
        for sign in (1.0, -1.0):
            attempt(torch.full_like(largest, step), sign)
    center, side = best_step, best.sign()
    for offset in range(1 - _COARSE, _COARSE):
        if offset:
            attempt(center + offset, side)
    check_finite(best_error, dtype)
    return best


def cluster_result(
    clusters: Clusters,
    scales: Tensor,
    exact: Tensor,
    dtype: torch.dtype,
    damp_percent: float | None,
) -> ClusterResult:
    """Put codes, scales and kept weights together.

    Args:
        clusters: of rows [out, in].
        scales: float32 [out, groups].
        exact: float32 [out, in], the kept weights, 0 elsewhere.
        dtype: the 16-bit type of scales and kept weights.
        damp_percent: as in `ClusterResult`.

    Raises:
        QuantizeError: a scale or a kept weight does not fit the 16-bit type.
    """
    size = exact.shape[1] // scales.shape[1]
    weight = clusters.codes * scales.repeat_interleave(size, dim=1) + exact
    check_finite(weight.to(dtype), dtype)
    return ClusterResult(clusters, scales.to(dtype), weight, damp_percent)


def _pairs(W: Tensor) -> Tensor:
    """View [rows, n] as [rows, pairs, 2, 3], padded with zeros."""
    return pad(W, (0, -W.shape[1] % PAIR)).view(W.shape[0], -1, 2, CLUSTER)


def _index_errors(units: Tensor, weights: Tensor | None, norm: float) -> Tensor:
    """Error of each pair under each index.

    Args:
        units: weights over their scale, float32 [rows, pairs, 2, 3].
        weights: float32 [1, pairs, 2, 3], of the errors; None: all count the same.
        norm: exponent of the error.

    Returns:
        float32 [rows, pairs, 4].
    """

    def errors(difference: Tensor) -> Tensor:
        raised = difference.abs_().pow_(norm)
        return raised if weights is None else raised.mul_(weights)

    nearest = units.round()
    narrow = errors(nearest.clamp(*NARROW) - units).sum((2, 3))
    wide = errors(nearest.clamp_(*WIDE) - units).sum(2)
    zeroed = errors(units.clone()).sum(2)
    # By the zeroed place: all wide but that one.
    protected = wide.sum(-1, keepdim=True) + (zeroed - wide)
    return torch.cat([narrow.unsqueeze(-1), protected], dim=-1)
