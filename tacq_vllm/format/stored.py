"""What the layouts of a quantized linear have in common (SPEC.md).

A layout says how codes are stored. Beside them every linear has scales and kept
weights, and W = step · scale + outliers, a step being a code less its zero-point.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tacq_vllm.format.outliers import Outliers, decode_outliers
from tacq_vllm.format.schema import LayoutName


@dataclass(frozen=True)
class TensorSpec:
    """Type and shape that a tensor must have."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's data."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class StoredLinear(Protocol):
    """A quantized linear `[out, in]` as the checkpoint stores it."""

    @property
    def layout(self) -> "Layout":
        """How its codes are stored."""

    @property
    def scales(self) -> Tensor:
        """16-bit [out, groups]."""

    @property
    def outliers(self) -> Tensor:
        """int32 [out + 1 + nnz]."""

    @property
    def out_features(self) -> int:
        """Rows of the weight."""

    @property
    def in_features(self) -> int:
        """Columns of the weight."""

    @property
    def group_size(self) -> int:
        """Input columns that share a scale."""

    def tensors(self) -> dict[str, Tensor]:
        """The stored tensors by the last part of their names."""

    def steps(self, start: int, stop: int) -> Tensor:
        """Steps of the rows [start, stop): float32 [stop - start, in]."""


class Layout(Protocol):
    """How codes are stored."""

    @property
    def name(self) -> LayoutName:
        """What the configuration calls it."""

    @property
    def bits(self) -> int:
        """Bits of a code, as the configuration states them."""

    @property
    def row_multiple(self) -> int:
        """Rows are cut at its multiples."""

    @property
    def column_multiple(self) -> int:
        """Columns are cut at its multiples."""

    @property
    def largest_step(self) -> int:
        """The largest step, in absolute value."""

    def code_specs(
        self, out_features: int, in_features: int, groups: int
    ) -> dict[str, TensorSpec]:
        """Types and shapes of a linear's codes and zero-points, by the tensor's name.

        A name is the last part of the one in the file.
        """

    def linear(self, tensors: Mapping[str, Tensor], in_features: int) -> StoredLinear:
        """Invert `StoredLinear.tensors`."""


def unpack_outliers(linear: StoredLinear) -> Outliers:
    """Decode the kept weights of a linear."""
    return decode_outliers(linear.outliers, linear.out_features, linear.scales.dtype)
