"""Modules that hold their weights as on a GPU, where there is none."""

import pytest
import torch

from tacq_vllm import layers
from tacq_vllm.format.clustered import ClusteredLinear
from tacq_vllm.format.linear import PackedLinear
from tacq_vllm.kernels.tiles import TiledLinear
from tacq_vllm.kernels.tiling import can_tile, tile


def arrange_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `TacqLinear` arrange weights on a CPU for x in 16 bits."""

    def arrange(
        linear: PackedLinear | ClusteredLinear, x_dtype: torch.dtype
    ) -> PackedLinear | ClusteredLinear | TiledLinear:
        is_tiled = x_dtype.itemsize == 2 and can_tile(linear)
        return tile(linear) if is_tiled and linear.scales.is_cpu else linear

    monkeypatch.setattr(layers, "arrange", arrange)
