"""Products of other packages on an NVIDIA GPU, where they are installed."""

from collections.abc import Iterator
from copy import deepcopy
from importlib.util import find_spec
from typing import Any

import torch
from peers import Kernel, copies
from torch import Tensor

SCALE = 1 / 64


def gpu_kernels(n: int, k: int, group_size: int) -> Iterator[Kernel]:
    """Humming's of 2 to 4 bits and GemLite's of 2 and 4, without kept weights."""
    if find_spec("humming"):
        for bits in (2, 3, 4):
            yield _humming(bits, n, k, group_size)
    if find_spec("gemlite"):
        for bits in (2, 4):
            yield _gemlite(bits, n, k, group_size)


def _random_codes(bits: int, n: int, k: int, group_size: int) -> Tensor:
    """Codes [n, k], the smallest and the largest in every group: it can be found."""
    codes = torch.randint(0, 1 << bits, (n, k // group_size, group_size))
    codes[..., 0], codes[..., 1] = 0, (1 << bits) - 1
    return codes.view(n, k)


def _kernel(
    name: str, bits: int, group_size: int, codes: Tensor, module: Any
) -> Kernel:
    def multiply(x: Tensor, weight: Any) -> Tensor:
        product: Tensor = weight(x)
        return product

    nbytes = sum(p.nbytes for p in module.parameters())
    return Kernel(
        f"{name}_w{bits}",
        bits,
        group_size,
        [deepcopy(module) for _ in range(copies(nbytes))],
        multiply,
        (codes - (1 << bits - 1)).float() * SCALE,
        nbytes,
    )


def _humming(bits: int, n: int, k: int, group_size: int) -> Kernel:
    from humming.layer import HummingLayer

    codes = _random_codes(bits, n, k, group_size)
    layer = HummingLayer(
        shape_n=n,
        shape_k=k,
        weight_config={
            "b_dtype": f"uint{bits}",
            "weight_scale_group_size": group_size,
            "has_zero_point": True,
        },
        torch_dtype=torch.bfloat16,
    ).cuda()
    layer.load_from_unquantized((codes - (1 << bits - 1)).bfloat16() * SCALE)
    layer.transform()
    return _kernel("humming", bits, group_size, codes, layer)


def _gemlite(bits: int, n: int, k: int, group_size: int) -> Kernel:
    from gemlite import DType, GemLiteLinearTriton

    codes = _random_codes(bits, n, k, group_size)
    layer = GemLiteLinearTriton(
        W_nbits=bits,
        group_size=group_size,
        in_features=k,
        out_features=n,
        input_dtype=DType.BF16,
        output_dtype=DType.BF16,
    )
    grid = torch.ones(n, k // group_size, dtype=torch.bfloat16)
    layer.pack(codes.to(torch.uint8), grid * SCALE, grid * (1 << bits - 1))
    return _kernel("gemlite", bits, group_size, codes, layer)
