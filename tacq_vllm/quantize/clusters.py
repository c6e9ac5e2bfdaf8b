"""Rounding a weight to FineQ's clusters of three (arXiv 2504.19746).

A scale is searched per row, or per group of columns; given a scale, every pair of
clusters takes whichever of the four indices leaves the least error. So a cluster counts
as one with an outlier where a weight is large against the scale, and it is the smallest
weight that is zeroed.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from tacq_vllm.config import GptqConfig
from tacq_vllm.format.clusters import CLUSTER, NARROW, PAIR, WIDE, Clusters

_CHUNK_WEIGHTS = 1 << 16
"""Weights searched at a time, so that the loop works in cache."""

_COARSE = 4
"""Every so many scales are tried first."""


@dataclass(frozen=True)
class ClusteredWeight:
    """A weight rounded to clusters: value = code · scale."""

    clusters: Clusters
    """Of rows [out, in]."""
    scales: Tensor
    """16-bit [out, groups], of either sign, never zero."""


def round_to_clusters(
    W: Tensor, group_size: int, dtype: torch.dtype, config: GptqConfig
) -> ClusteredWeight:
    """Round a weight to the nearest codes on the best scales.

    Args:
        W: float32 [out, in].
        group_size: columns that share a scale, a multiple of 6, or -1 for the row. The
            last group of a row may be shorter.
        dtype: the 16-bit type of the scales.
        config: number of steps, smallest shrink factor, norm of the error.

    Raises:
        ValueError: the group size is not a multiple of 6.
    """
    if group_size != -1 and group_size % PAIR:
        raise ValueError(f"group_size {group_size}: must be -1 or a multiple of {PAIR}")
    out_features, in_features = W.shape
    size = in_features + -in_features % PAIR if group_size == -1 else group_size
    groups = pad(W, (0, -in_features % size)).reshape(-1, size)
    rows = max(1, _CHUNK_WEIGHTS // size)
    scales, codes, indices = [], [], []
    for chunk in groups.split(rows):
        found = search_scales(chunk, dtype, config)
        rounded = round_on_scales(chunk, found, config.grid_norm)
        scales.append(found)
        codes.append(rounded.codes)
        indices.append(rounded.indices)
    return ClusteredWeight(
        Clusters(
            torch.cat(codes).view(out_features, -1)[:, :in_features].contiguous(),
            torch.cat(indices)
            .view(out_features, -1)[:, : -(-in_features // PAIR)]
            .contiguous(),
        ),
        torch.cat(scales).to(dtype).view(out_features, -1),
    )


def round_on_scales(W: Tensor, scales: Tensor, norm: float) -> Clusters:
    """Codes and indices of least error on given scales.

    Args:
        W: float32 [rows, n], n a multiple of 6.
        scales: float32 [rows].
        norm: exponent of the error.
    """
    units = (W / scales.unsqueeze(1)).view(W.shape[0], -1, 2, CLUSTER)
    indices = _index_errors(units, norm).argmin(-1)
    is_narrow = (indices == 0)[..., None, None]
    places = torch.arange(1, CLUSTER + 1, device=W.device)
    codes = torch.where(
        is_narrow, units.round().clamp_(*NARROW), units.round().clamp_(*WIDE)
    ).masked_fill_(indices[..., None, None] == places, 0.0)
    return Clusters(codes.flatten(1).to(torch.int8), indices.to(torch.uint8))


def search_scales(W: Tensor, dtype: torch.dtype, config: GptqConfig) -> Tensor:
    """The scale of each row that leaves the least error.

    From the largest weight at code 1 the scales fall geometrically to the one that puts
    it, shrunk as far as the configuration allows, at the widest code. Both signs are
    tried: one side of the range is longer.

    Args:
        W: float32 [rows, n], n a multiple of 6.
        dtype: the 16-bit type that scales are stored in.
        config: number of steps, smallest shrink factor, norm of the error.

    Returns:
        float32 [rows], representable in `dtype`, never zero.
    """
    largest = W.abs().amax(1)
    smallest_factor = (1 - config.grid_max_shrink) / -WIDE[0]
    grouped = W.view(W.shape[0], -1, 2, CLUSTER)
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
        errors = _index_errors(units, config.grid_norm).amin(-1).sum(1)
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
    return best


def _index_errors(units: Tensor, norm: float) -> Tensor:
    """Error of each pair under each index.

    Args:
        units: weights over their scale, float32 [rows, pairs, 2, 3].
        norm: exponent of the error.

    Returns:
        float32 [rows, pairs, 4].
    """
    nearest = units.round()
    narrow = (nearest.clamp(*NARROW) - units).abs_().pow_(norm).sum((2, 3))
    wide = (nearest.clamp_(*WIDE) - units).abs_().pow_(norm).sum(2)
    zeroed = units.abs().pow_(norm).sum(2)
    # By the zeroed place: all wide but that one.
    protected = wide.sum(-1, keepdim=True) + (zeroed - wide)
    return torch.cat([narrow.unsqueeze(-1), protected], dim=-1)
