"""Cuts of a packed linear, made as SPEC.md allows them."""

from dataclasses import replace

from tacq_vllm.format.linear import PLANE_SUFFIXES, PackedLinear
from tacq_vllm.format.outliers import (
    encode_outliers,
    slice_outlier_columns,
    slice_outlier_rows,
)
from tacq_vllm.format.packing import PLANE_WIDTHS, WORD_BITS, pack_codes, packed_size
from tacq_vllm.format.stored import unpack_outliers


def slice_rows(linear: PackedLinear, start: int, stop: int) -> PackedLinear:
    """The rows [start, stop), where words of the zero-points end."""
    outliers = slice_outlier_rows(unpack_outliers(linear), start, stop)
    tensors = linear.tensors()
    zeros = pack_codes(linear.zeros[start:stop], linear.bits, dim=0)
    for suffix, words in zip(PLANE_SUFFIXES, zeros, strict=False):
        name = f"qweight{suffix}"
        tensors[name] = tensors[name][start:stop]
        tensors[f"qzeros{suffix}"] = words
    tensors["scales"] = linear.scales[start:stop]
    tensors["outliers"] = encode_outliers(outliers)
    return PackedLinear.from_tensors(tensors, linear.bits, linear.in_features)


def slice_columns(linear: PackedLinear, start: int, stop: int) -> PackedLinear:
    """The columns [start, stop), where words and groups end; views where possible."""
    outliers = slice_outlier_columns(unpack_outliers(linear), start, stop)
    tensors = linear.tensors() | {"outliers": encode_outliers(outliers)}
    groups = slice(None)
    if linear.scales.shape[1] > 1:
        groups = slice(start // linear.group_size, stop // linear.group_size)
    tensors["scales"] = linear.scales[:, groups]
    for width, suffix in zip(PLANE_WIDTHS[linear.bits], PLANE_SUFFIXES, strict=False):
        words = slice(start * width // WORD_BITS, packed_size(stop, width))
        tensors[f"qweight{suffix}"] = tensors[f"qweight{suffix}"][:, words]
        tensors[f"qzeros{suffix}"] = tensors[f"qzeros{suffix}"][:, groups]
    packed = PackedLinear.from_tensors(tensors, linear.bits, linear.in_features)
    return replace(packed, in_features=stop - start)
