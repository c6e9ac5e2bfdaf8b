"""The tensors of one quantized linear (SPEC.md, "Tensors")."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tacq_vllm.format.outliers import (
    Outliers,
    decode_outliers,
    encode_outliers,
    slice_outlier_columns,
    slice_outlier_rows,
)
from tacq_vllm.format.packing import (
    PLANE_WIDTHS,
    WORD_BITS,
    pack_codes,
    packed_size,
    unpack_codes,
)
from tacq_vllm.format.schema import QuantizationSchema, num_groups

PLANE_SUFFIXES = ("", "_high")
"""What the name of each plane's tensor ends with, lowest bits first."""


def tensor_names(bits: int) -> tuple[str, ...]:
    """The last parts of the names of a linear's tensors."""
    suffixes = PLANE_SUFFIXES[: len(PLANE_WIDTHS[bits])]
    weights = (f"qweight{suffix}" for suffix in suffixes)
    zeros = (f"qzeros{suffix}" for suffix in suffixes)
    return (*weights, *zeros, "scales", "outliers")


@dataclass(frozen=True)
class TensorSpec:
    """Type and shape that a tensor must have."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's data."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


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
    def out_features(self) -> int:
        """Rows of the weight."""
        return self.qweight.shape[0]

    @property
    def group_size(self) -> int:
        """Input columns that share a scale."""
        return self.in_features // self.scales.shape[1]

    @property
    def weight_planes(self) -> tuple[Tensor, ...]:
        """The planes of the codes, lowest bits first."""
        return _planes(self.qweight, self.qweight_high)

    @property
    def zero_planes(self) -> tuple[Tensor, ...]:
        """The planes of the zero-points, lowest bits first."""
        return _planes(self.qzeros, self.qzeros_high)

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


def unpack_outliers(linear: PackedLinear) -> Outliers:
    """Decode the kept weights of a linear."""
    return decode_outliers(linear.outliers, linear.out_features, linear.scales.dtype)


def linear_specs(schema: QuantizationSchema, name: str) -> dict[str, TensorSpec]:
    """Type and shape of every tensor of one linear, by the last part of its name."""
    out_features, in_features = schema.linears[name]
    groups = num_groups(in_features, schema.group_size)
    specs = {"scales": TensorSpec(schema.torch_dtype, (out_features, groups))}
    for width, suffix in zip(PLANE_WIDTHS[schema.bits], PLANE_SUFFIXES, strict=False):
        specs[f"qweight{suffix}"] = TensorSpec(
            torch.int32, (out_features, packed_size(in_features, width))
        )
        specs[f"qzeros{suffix}"] = TensorSpec(
            torch.int32, (packed_size(out_features, width), groups)
        )
    words = out_features + 1 + schema.num_outliers(name)
    specs["outliers"] = TensorSpec(torch.int32, (words,))
    return specs


def stored_bytes(schema: QuantizationSchema, name: str) -> int:
    """Bytes of all tensors of one linear."""
    return sum(spec.nbytes for spec in linear_specs(schema, name).values())


def slice_rows(linear: PackedLinear, start: int, stop: int) -> PackedLinear:
    """Cut output rows [start, stop), as column-parallel linears are.

    Raises:
        ValueError: the cut does not fall between two words of the zero-points.
    """
    _check_cut("rows", start, stop, linear.out_features, WORD_BITS)
    outliers = slice_outlier_rows(unpack_outliers(linear), start, stop)
    zeros = unpack_codes(linear.zero_planes, linear.bits, linear.out_features, dim=0)
    tensors = {
        **linear.tensors(),
        **_named_planes("qweight", tuple(p[start:stop] for p in linear.weight_planes)),
        **_named_planes("qzeros", pack_codes(zeros[start:stop], linear.bits, dim=0)),
        "scales": linear.scales[start:stop],
        "outliers": encode_outliers(outliers),
    }
    return PackedLinear.from_tensors(tensors, linear.bits, linear.in_features)


def slice_columns(linear: PackedLinear, start: int, stop: int) -> PackedLinear:
    """Cut input columns [start, stop), as row-parallel linears are.

    Raises:
        ValueError: the cut does not fall between two words or two groups.
    """
    _check_cut("columns", start, stop, linear.in_features, WORD_BITS)
    outliers = slice_outlier_columns(unpack_outliers(linear), start, stop)
    codes = {
        name: plane[:, start * width // WORD_BITS : packed_size(stop, width)]
        for (name, plane), width in zip(
            _named_planes("qweight", linear.weight_planes).items(),
            PLANE_WIDTHS[linear.bits],
            strict=True,
        )
    }
    tensors = {**linear.tensors(), **codes, "outliers": encode_outliers(outliers)}
    if linear.scales.shape[1] > 1:
        size = linear.group_size
        _check_cut("columns", start, stop, linear.in_features, size)
        groups = slice(start // size, stop // size)
        tensors["scales"] = linear.scales[:, groups]
        for name, plane in _named_planes("qzeros", linear.zero_planes).items():
            tensors[name] = plane[:, groups]
    packed = PackedLinear.from_tensors(tensors, linear.bits, linear.in_features)
    return replace(packed, in_features=stop - start)


def _planes(low: Tensor, high: Tensor | None) -> tuple[Tensor, ...]:
    return (low,) if high is None else (low, high)


def _named_planes(name: str, planes: tuple[Tensor, ...]) -> dict[str, Tensor]:
    return {
        f"{name}{suffix}": plane
        for suffix, plane in zip(PLANE_SUFFIXES, planes, strict=False)
    }


def _check_cut(axis: str, start: int, stop: int, length: int, multiple: int) -> None:
    if start % multiple or (stop % multiple and stop != length):
        raise ValueError(
            f"{axis} {start} to {stop} of {length}: cut at multiples of {multiple}"
        )
