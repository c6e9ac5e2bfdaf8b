"""The tensors of a linear whose codes are in planes (SPEC.md, "Tensors")."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from tacq_vllm.format.outliers import Outliers, encode_outliers
from tacq_vllm.format.packing import (
    PLANE_WIDTHS,
    WORD_BITS,
    pack_codes,
    packed_size,
    unpack_codes,
)
from tacq_vllm.format.schema import LayoutName
from tacq_vllm.format.stored import TensorSpec

PLANE_SUFFIXES = ("", "_high")
"""What the name of each plane's tensor ends with, lowest bits first."""


@dataclass(frozen=True)
class PlanesLayout:
    """Codes of 2 to 4 bits in planes, and zero-points."""

    bits: int

    name: ClassVar[LayoutName] = "planes"
    row_multiple: ClassVar[int] = WORD_BITS
    column_multiple: ClassVar[int] = WORD_BITS

    @property
    def largest_step(self) -> int:
        """See `Layout`."""
        return (1 << self.bits) - 1

    def code_specs(
        self, out_features: int, in_features: int, groups: int
    ) -> dict[str, TensorSpec]:
        """See `Layout`."""
        specs = {}
        for width, suffix in zip(PLANE_WIDTHS[self.bits], PLANE_SUFFIXES, strict=False):
            specs[f"qweight{suffix}"] = TensorSpec(
                torch.int32, (out_features, packed_size(in_features, width))
            )
            specs[f"qzeros{suffix}"] = TensorSpec(
                torch.int32, (packed_size(out_features, width), groups)
            )
        return specs

    def linear(self, tensors: Mapping[str, Tensor], in_features: int) -> "PackedLinear":
        """See `Layout`."""
        return PackedLinear.from_tensors(tensors, self.bits, in_features)


@dataclass(frozen=True)
class PackedLinear:
    """A quantized linear `[out, in]` as the checkpoint stores it.

    W = (code - zero) · scale + outliers. Of 2 and 4 bits the high planes are None.
    """

    qweight: Tensor
    """int32 [out, words]: the low plane of the codes, packed along `in`."""
    qweight_high: Tensor | None
    scales: Tensor
    """16-bit [out, groups]."""
    qzeros: Tensor
    """int32 [words, groups]: the low plane of the zero-points, packed along `out`."""
    qzeros_high: Tensor | None
    outliers: Tensor
    """int32 [out + 1 + nnz]."""
    bits: int
    in_features: int

    @property
    def layout(self) -> PlanesLayout:
        """How its codes are stored."""
        return PlanesLayout(self.bits)

    @property
    def out_features(self) -> int:
        """Rows of the weight."""
        return self.qweight.shape[0]

    @property
    def group_size(self) -> int:
        """Input columns that share a scale."""
        return self.in_features // self.scales.shape[1]

    @property
    def weight_planes(self) -> tuple[Tensor, ...]:
        """The planes of the codes, lowest bits first: int32 [out, words] each."""
        return _planes(self.qweight, self.qweight_high)

    @property
    def zero_planes(self) -> tuple[Tensor, ...]:
        """The planes of the zero-points, lowest bits first: int32 [words, groups]."""
        return _planes(self.qzeros, self.qzeros_high)

    @cached_property
    def zeros(self) -> Tensor:
        """The zero-points: uint8 [out, groups]."""
        return unpack_codes(self.zero_planes, self.bits, self.out_features, dim=0)

    def steps(self, start: int, stop: int) -> Tensor:
        """Codes less their zero-points, of the rows [start, stop).

        Returns:
            float32 [stop - start, in].
        """
        planes = tuple(plane[start:stop] for plane in self.weight_planes)
        codes = unpack_codes(planes, self.bits, self.in_features)
        grouped = codes.view(len(codes), self.scales.shape[1], -1).to(torch.float32)
        grouped -= self.zeros[start:stop].unsqueeze(-1)
        return grouped.flatten(1)

    def tensors(self) -> dict[str, Tensor]:
        """The stored tensors by the last part of their names."""
        named = {
            "qweight": self.qweight,
            "qweight_high": self.qweight_high,
            "scales": self.scales,
            "qzeros": self.qzeros,
            "qzeros_high": self.qzeros_high,
            "outliers": self.outliers,
        }
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], bits: int, in_features: int
    ) -> "PackedLinear":
        """Invert `tensors`."""
        return cls(
            qweight=tensors["qweight"],
            qweight_high=tensors.get("qweight_high"),
            scales=tensors["scales"],
            qzeros=tensors["qzeros"],
            qzeros_high=tensors.get("qzeros_high"),
            outliers=tensors["outliers"],
            bits=bits,
            in_features=in_features,
        )


def pack_linear(
    codes: Tensor, zeros: Tensor, scales: Tensor, outliers: Outliers, bits: int
) -> PackedLinear:
    """Pack a quantized weight.

    Args:
        codes: integers [out, in] in [0, 2**bits); the zero-point at outliers.
        zeros: integers [out, groups] in [0, 2**bits).
        scales: float16 or bfloat16 [out, groups].
        outliers: the weights kept in 16 bits, in the type of `scales`.
        bits: 2, 3 or 4.
    """
    tensors = dict(_named_planes("qweight", pack_codes(codes, bits, dim=1)))
    tensors |= _named_planes("qzeros", pack_codes(zeros, bits, dim=0))
    tensors["scales"] = scales.contiguous()
    tensors["outliers"] = encode_outliers(outliers)
    return PackedLinear.from_tensors(tensors, bits, codes.shape[1])


def _planes(low: Tensor, high: Tensor | None) -> tuple[Tensor, ...]:
    return (low,) if high is None else (low, high)


def _named_planes(name: str, planes: tuple[Tensor, ...]) -> dict[str, Tensor]:
    return {
        f"{name}{suffix}": plane
        for suffix, plane in zip(PLANE_SUFFIXES, planes, strict=False)
    }
