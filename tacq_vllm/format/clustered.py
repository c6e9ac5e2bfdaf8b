"""The tensors of a linear in FineQ's layout (SPEC.md, "Clusters")."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tacq_vllm.format.clusters import (
    BLOCK,
    WIDE,
    Clusters,
    clustered_words,
    pack_clusters,
    unpack_clusters,
)
from tacq_vllm.format.outliers import Outliers, encode_outliers
from tacq_vllm.format.schema import LayoutName
from tacq_vllm.format.stored import TensorSpec


@dataclass(frozen=True)
class ClusteredLayout:
    """Clusters of three weights: codes of 2 bits, or of 3 beside an outlier."""

    name: ClassVar[LayoutName] = "clusters"
    bits: ClassVar[int] = 2
    row_multiple: ClassVar[int] = 1
    column_multiple: ClassVar[int] = BLOCK
    largest_step: ClassVar[int] = -WIDE[0]

    def code_specs(
        self, out_features: int, in_features: int, groups: int
    ) -> dict[str, TensorSpec]:
        """See `Layout`."""
        shape = (out_features, clustered_words(in_features))
        return {"qweight": TensorSpec(torch.int32, shape)}

    def linear(
        self, tensors: Mapping[str, Tensor], in_features: int
    ) -> "ClusteredLinear":
        """See `Layout`."""
        return ClusteredLinear(**tensors, in_features=in_features)


@dataclass(frozen=True)
class ClusteredLinear:
    """A quantized linear `[out, in]` of clusters: W = code · scale + outliers.

    A scale is that of a whole row, or of a multiple of `BLOCK` columns.
    """

    qweight: Tensor
    """int32 [out, clustered_words(in)]."""
    scales: Tensor
    """16-bit [out, groups], of either sign."""
    outliers: Tensor
    """int32 [out + 1 + nnz]."""
    in_features: int

    layout: ClassVar[ClusteredLayout] = ClusteredLayout()

    @property
    def out_features(self) -> int:
        """Rows of the weight."""
        return self.qweight.shape[0]

    @property
    def group_size(self) -> int:
        """Input columns that share a scale."""
        return self.in_features // self.scales.shape[1]

    def tensors(self) -> dict[str, Tensor]:
        """The stored tensors by the last part of their names."""
        return {
            "qweight": self.qweight,
            "scales": self.scales,
            "outliers": self.outliers,
        }

    def steps(self, start: int, stop: int) -> Tensor:
        """Codes of the rows [start, stop): float32 [stop - start, in]."""
        words = self.qweight[start:stop]
        return unpack_clusters(words, self.in_features).codes.to(torch.float32)


def pack_clustered(
    clusters: Clusters, scales: Tensor, outliers: Outliers
) -> ClusteredLinear:
    """Pack a weight that is rounded to clusters.

    Args:
        clusters: of rows [out, in]; code 0 at outliers.
        scales: float16 or bfloat16 [out, groups].
        outliers: the weights kept in 16 bits, in the type of `scales`.
    """
    return ClusteredLinear(
        qweight=pack_clusters(clusters),
        scales=scales.contiguous(),
        outliers=encode_outliers(outliers),
        in_features=clusters.codes.shape[-1],
    )
