"""After a linear has been warmed up no request waits for a kernel to be compiled."""

from collections.abc import Callable

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton")

from tacq_vllm.kernels import triton_clusters, triton_planes, triton_tiles
from tacq_vllm.kernels.tiling import tile
from tests.builders import random_linear
from tests.clusters import random_clustered
from tests.kernels.gpu import kernel

KERNELS = {
    triton_planes: ("gemv_kernel", "gemm_kernel", "dequantize_kernel"),
    triton_tiles: (
        "tile_gemm_kernel",
        "transpose_kernel",
        "tile_batch_kernel",
        "tile_dequantize_kernel",
        "add_kept_kernel",
    ),
    triton_clusters: ("cluster_gemv_kernel", "cluster_dequantize_kernel"),
}


class Launcher:
    """Stands for a kernel; notes what it would be compiled for."""

    def __init__(self, name: str, compiled: set[tuple[object, ...]]) -> None:
        self.name = name
        self.compiled = compiled

    def __getitem__(self, grid: object) -> Callable[..., None]:
        def launch(*arguments: object, **constants: object) -> None:
            self.compiled.add((self.name, *constants.items()))

        return launch


@pytest.mark.parametrize(
    "linear",
    [
        random_linear(3, 96, 512, 64, 0.01, torch.bfloat16, 0)[0],
        # Its columns are split for up to 128 tokens, and for more they are not.
        tile(random_linear(3, 192, 1024, 64, 0.01, torch.bfloat16, 0)[0]),
        random_clustered(96, 192, -1, 0.01, torch.bfloat16, 0)[0],
    ],
    ids=["planes", "tiles", "clusters"],
)
@pytest.mark.parametrize("has_bias", [False, True])
def test_every_number_of_tokens(
    monkeypatch: pytest.MonkeyPatch, linear, has_bias: bool
) -> None:
    compiled: set[tuple[object, ...]] = set()
    for module, names in KERNELS.items():
        for name in names:
            monkeypatch.setattr(module, name, Launcher(name, compiled))
    bias = None
    if has_bias:
        bias = torch.zeros(linear.out_features, dtype=torch.bfloat16)
    kernel.warm_up(linear, torch.bfloat16, bias)
    warm = set(compiled)

    for tokens in range(1, 260):
        x = torch.zeros(tokens, linear.in_features, dtype=torch.bfloat16)
        kernel.multiply(x, linear, bias)

    assert compiled == warm
