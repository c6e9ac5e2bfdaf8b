"""The `tacq::` custom ops and the choice of kernel behind them."""

import torch
from torch import Tensor

from tacq_vllm.format.linear import PackedLinear
from tacq_vllm.kernels.reference import linear_forward


@torch.library.custom_op("tacq::linear", mutates_args=())
def _linear(
    x: Tensor,
    qweight: Tensor,
    qweight_high: Tensor | None,
    scales: Tensor,
    qzeros: Tensor,
    qzeros_high: Tensor | None,
    outliers: Tensor,
    bias: Tensor | None,
    bits: int,
) -> Tensor:
    packed = PackedLinear(
        qweight=qweight,
        qweight_high=qweight_high,
        scales=scales,
        qzeros=qzeros,
        qzeros_high=qzeros_high,
        outliers=outliers,
        bits=bits,
        in_features=x.shape[-1],
    )
    return linear_forward(x, packed, bias)


@_linear.register_fake
def _(
    x: Tensor,
    qweight: Tensor,
    qweight_high: Tensor | None,
    scales: Tensor,
    qzeros: Tensor,
    qzeros_high: Tensor | None,
    outliers: Tensor,
    bias: Tensor | None,
    bits: int,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], qweight.shape[0])


def quantized_linear(x: Tensor, packed: PackedLinear, bias: Tensor | None) -> Tensor:
    """Multiply x [..., in] with a packed weight and add `bias` [out]: [..., out].

    The tensors must have passed `check_linear`: kernels trust their indices.
    """
    out: Tensor = _linear(
        x,
        packed.qweight,
        packed.qweight_high,
        packed.scales,
        packed.qzeros,
        packed.qzeros_high,
        packed.outliers,
        bias,
        packed.bits,
    )
    return out
