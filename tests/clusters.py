"""Random codes in FineQ's layout."""

import torch
from torch import Tensor

from tacq_vllm.format.clustered import ClusteredLinear, pack_clustered
from tacq_vllm.format.clusters import Clusters
from tacq_vllm.format.outliers import select_outliers
from tests.builders import random_mask


def random_clusters(rows: int, length: int, seed: int) -> Clusters:
    """Rows of codes, about a quarter of whose pairs have no outlier."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int, shape: tuple[int, ...]) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    pairs = -(-length // 6)
    indices = draw(0, 4, (rows, pairs))
    shape = (rows, pairs, 2, 3)
    is_narrow = (indices == 0)[:, :, None, None]
    codes = torch.where(is_narrow, draw(-2, 2, shape), draw(-4, 4, shape))
    codes[(indices[:, :, None, None] == torch.arange(1, 4)).expand(shape)] = 0
    return Clusters(
        codes.flatten(1)[:, :length].to(torch.int8), indices.to(torch.uint8)
    )


def random_clustered(
    out_features: int,
    in_features: int,
    group_size: int,
    density: float,
    dtype: torch.dtype,
    seed: int,
    outlier_rows: slice = slice(None),
) -> tuple[ClusteredLinear, Tensor]:
    """A linear in clusters and its dense weight, float64 [out, in].

    Codes at kept weights are random too: the two parts are added, whatever they are.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (out_features, in_features)
    size = in_features if group_size == -1 else group_size
    clusters = random_clusters(out_features, in_features, seed)
    grid_shape = (out_features, in_features // size)
    scales = (torch.randn(grid_shape, generator=generator) * 0.1).to(dtype)
    values = torch.randn(shape, generator=generator).to(dtype)
    mask = random_mask(shape, density, generator, outlier_rows)

    dense = clusters.codes * scales.double().repeat_interleave(size, dim=1)
    dense[mask] += values[mask].double()
    return pack_clustered(clusters, scales, select_outliers(values, mask)), dense
