"""Random codes in FineQ's layout."""

import torch
from torch import Tensor

from tacq_vllm.format.clusters import Clusters


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
