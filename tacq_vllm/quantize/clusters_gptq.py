"""GPTQ on FineQ's clusters: rounding whose errors later columns make up for.

GPTQ: arXiv 2210.17323; clusters: arXiv 2504.19746. One index holds for six columns, so
it is chosen when the first of them comes up: each of the four is tried on all six, with
their errors moved along as GPTQ does, and the one that costs the output least is taken.
"""

import torch
from torch import Tensor

from tacq_vllm.config import GptqConfig
from tacq_vllm.format.clusters import BLOCK, CLUSTER, NARROW, PAIR, WIDE, Clusters
from tacq_vllm.quantize.clusters import cluster_result, fit_scales
from tacq_vllm.quantize.columns import lazy_block, round_columns
from tacq_vllm.quantize.gptq import inverse_factor
from tacq_vllm.quantize.refit import refit_scales
from tacq_vllm.quantize.result import ClusterResult


def _ends(narrow: int, wide: int) -> Tensor:
    """One end of the codes' range by index and place: float32 [4, 3]."""
    rows = [[narrow] * CLUSTER]
    for zeroed in range(CLUSTER):
        rows.append([0 if place == zeroed else wide for place in range(CLUSTER)])
    return torch.tensor(rows, dtype=torch.float32)


_LOW, _HIGH = (_ends(*ends) for ends in zip(NARROW, WIDE, strict=True))


def compensate_clusters(
    W: Tensor,
    H: Tensor,
    kept: Tensor | None,
    *,
    group_size: int,
    dtype: torch.dtype,
    keep_original: bool,
    config: GptqConfig,
) -> ClusterResult:
    """Round W pair by pair, moving each column's error to those that follow.

    Args:
        W: float32 [out, in]; rows of linears that share their input may be stacked.
        H: float32 [in, in], from `Hessian.mean`.
        kept: bool [out, in], the weights to store in 16 bits, or None.
        group_size: columns that share a scale, or -1.
        dtype: the 16-bit type of scales and kept weights.
        keep_original: keep a weight as it is in W, not as compensation has moved it.
        config: damping, block size, order and search of scales. Scales are always
            fitted before, each column's error weighed by the Hessian's diagonal.

    Raises:
        QuantizeError: the Hessian stays singular at the largest damping, or a scale or
            a kept weight does not fit the 16-bit type.
    """
    out_features, in_features = W.shape
    if kept is None:
        kept = torch.zeros_like(W, dtype=torch.bool)
    order = _pair_order(H, config.activation_order)
    U, damp_percent = inverse_factor(H[order][:, order], config.damp_percent)
    weights = H.diagonal() + damp_percent * H.diagonal().mean()
    scales = fit_scales(
        W.masked_fill(kept, 0.0),
        # Without any input no error would count, and any scale do.
        weights if bool(weights.any()) else None,
        group_size,
        dtype,
        config,
    )
    size = in_features // scales.shape[1]

    columns = order.tolist()
    low, high = _LOW.to(W.device), _HIGH.to(W.device)
    codes = torch.empty(in_features, out_features, device=W.device)
    exact = torch.zeros(in_features, out_features, device=W.device)
    indices = torch.empty(
        -(-in_features // PAIR), out_features, dtype=torch.int64, device=W.device
    )

    def kept_values(column: int, w: Tensor) -> Tensor:
        return (W[:, column] if keep_original else w).to(dtype).to(torch.float32)

    def choose_index(step: int, rest: Tensor) -> Tensor:
        """The index of each row, for the pair that begins at a step: int64 [out]."""
        first = columns[step]
        count = min(PAIR, in_features - first)
        scale = scales[:, first // size]
        tried = rest[step : step + count].repeat(len(low), 1, 1)
        cost = torch.zeros(len(low), out_features, device=W.device)
        for place in range(count):
            w = tried[:, place]
            ends = (side[:, place % CLUSTER].unsqueeze(1) for side in (low, high))
            rounded = (w / scale).round_().clamp_(*ends).mul_(scale)
            column = first + place
            rounded = torch.where(kept[:, column], kept_values(column, w), rounded)
            factors = U[step + place, step + place : step + count]
            error = (w - rounded) / factors[0]
            cost += error.square()
            tried[:, place + 1 :] -= factors[1:, None] * error.unsqueeze(1)
        return cost.argmin(0)

    def round_column(step: int, rest: Tensor) -> Tensor:
        column, w = columns[step], rest[step]
        pair, place = divmod(column, PAIR)
        if place == 0:
            indices[pair] = choose_index(step, rest)
        ends = (side[indices[pair], place % CLUSTER] for side in (low, high))
        scale, mask = scales[:, column // size], kept[:, column]
        code = (w / scale).round_().clamp_(*ends).masked_fill_(mask, 0.0)
        codes[column] = code
        exact[column] = torch.where(mask, kept_values(column, w), 0.0)
        return code * scale + exact[column]

    # Whole pairs, for their columns must hold the errors of all before.
    wanted = BLOCK * max(1, config.block_size // BLOCK)
    round_columns(W, U, order, lazy_block(wanted, size, in_features), round_column)
    codes, exact = codes.T.contiguous(), exact.T.contiguous()
    if config.refit_scales:
        scales = refit_scales(W - exact, H, codes, scales, dtype)
    clusters = Clusters(codes.to(torch.int8), indices.T.to(torch.uint8).contiguous())
    return cluster_result(clusters, scales, exact, dtype, damp_percent)


def _pair_order(H: Tensor, largest_first: bool) -> Tensor:
    """Columns in the order of rounding, pairs whole; the last one may be short."""
    in_features = len(H)
    columns = torch.arange(in_features, device=H.device)
    if not largest_first:
        return columns
    whole = in_features - in_features % PAIR
    sizes = H.diagonal()[:whole].view(-1, PAIR).sum(1)
    pairs = sizes.argsort(descending=True, stable=True)
    return torch.cat([columns[:whole].view(-1, PAIR)[pairs].flatten(), columns[whole:]])
