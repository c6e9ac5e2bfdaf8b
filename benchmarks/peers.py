"""What the kernels are compared with."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn.functional import linear

from tacq_vllm.kernels import cpu_linear

BURST = 6
"""Products of a kernel before the next one's turn; on a CPU no copy is read twice."""

ROTATED_BYTES = 128 << 20
MANY = 1 << 30


@dataclass(frozen=True)
class Kernel:
    """One way to multiply with one weight, of which there are copies."""

    name: str
    bits: float
    group_size: int
    weights: list[Any]
    multiply: Callable[[Tensor, Any], Tensor]
    dense: Tensor
    """The weight's value, float32 [n, k]."""

    nbytes: int
    """Bytes of one copy."""

    activations: str = ""
    """What our kernel makes of x."""

    max_tokens: int = MANY
    """Rows of x up to which it is measured."""

    def chosen(self) -> AbstractContextManager[object]:
        """Where `multiply` is this kernel."""
        return patch.object(cpu_linear, "activations", lambda: self.activations)


def copies(nbytes: int) -> int:
    """Copies of a weight that no cache holds, with those of the other kernels."""
    return max(BURST, ROTATED_BYTES // nbytes)


def sixteen_bit_kernels(n: int, k: int) -> Iterator[Kernel]:
    """PyTorch's products in bfloat16, and the one in float32."""
    weights = [
        torch.randn(n, k, dtype=torch.bfloat16) for _ in range(copies(2 * n * k))
    ]

    dense = weights[0].float()

    def multiply_one(x: Tensor, weight: Tensor) -> Tensor:
        return torch.mv(weight, x[0])[None]

    kernel = Kernel("torch_linear_bf16", 16, 0, weights, linear, dense, 2 * n * k)
    yield kernel
    yield replace(
        kernel,
        name="torch_mv_bf16",
        multiply=multiply_one,
        max_tokens=1,
        # `linear` has just read its own.
        weights=[weight.clone() for weight in weights],
    )
    floats = [weight.float() for weight in weights[: copies(4 * n * k)]]
    yield Kernel("torch_linear_fp32", 32, 0, floats, linear_float, dense, 4 * n * k)


def linear_float(x: Tensor, weight: Tensor) -> Tensor:
    """The product in float32 of x in 16 bits."""
    return linear(x.float(), weight).to(x.dtype)


def int4_kernels(n: int, k: int, group_size: int) -> Iterator[Kernel]:
    """Products of 4-bit weights on CPUs: PyTorch's, and vLLM's if it is there."""
    yield _torch_int4(n, k, group_size)
    # vLLM has it for processors with AVX-512 alone.
    if find_spec("vllm") and torch.cpu._is_avx512_supported():
        yield _vllm_int4(n, k, group_size)


def _torch_int4(n: int, k: int, group_size: int) -> Kernel:
    """PyTorch's own 4-bit product for CPUs."""
    codes = torch.randint(0, 16, (n, k), dtype=torch.int32)
    scales, zeros = torch.rand(2, k // group_size, n).add(0.1).bfloat16()
    grid = torch.stack((scales, zeros), dim=-1).contiguous()
    stored = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    steps = (codes - 8).view(n, -1, group_size)
    dense = steps * scales.T[..., None].float() + zeros.T[..., None].float()
    nbytes = stored.nbytes + grid.nbytes

    def multiply(x: Tensor, weight: Any) -> Tensor:
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x, weight, group_size, grid)

    weights = [stored.clone() for _ in range(copies(nbytes))]
    return Kernel(
        "torch_int4", 4, group_size, weights, multiply, dense.view(n, k), nbytes
    )


def _vllm_int4(n: int, k: int, group_size: int) -> Kernel:
    """What vLLM serves GPTQ and AWQ checkpoints with; zero-points are all 8.

    A block of 16 outputs lies together: for every input two words of eight codes.
    """
    from vllm import _custom_ops as ops

    codes = torch.randint(0, 16, (k, n))
    scales = torch.rand(k // group_size, n).add(0.1).bfloat16()
    fields = codes.view(k, n // 16, 2, 8) << torch.arange(0, 32, 4)
    words = fields.sum(-1).to(torch.uint32).view(torch.int32)
    stored = words.permute(1, 0, 2).reshape(n // 16, 2 * k).contiguous()
    steps = (codes - 8).view(-1, group_size, n)
    dense = (steps * scales[:, None].float()).view(k, n).T
    instructions = "amx" if torch.cpu._is_amx_tile_supported() else "vec"

    def multiply(x: Tensor, weight: Any) -> Tensor:
        return ops.cpu_gemm_wna16(x, weight, scales, None, None, 8, instructions)

    nbytes = stored.nbytes + scales.nbytes
    weights = [stored.clone() for _ in range(copies(nbytes))]
    return Kernel("vllm_int4", 4, group_size, weights, multiply, dense, nbytes)
