"""A weight matrix as a method leaves it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, Self

from torch import Tensor

from tacq_vllm.format.clustered import ClusteredLinear, pack_clustered
from tacq_vllm.format.clusters import Clusters
from tacq_vllm.format.linear import PackedLinear, pack_linear
from tacq_vllm.format.outliers import select_outliers
from tacq_vllm.format.stored import StoredLinear


class PackableResult(Protocol):
    """A matrix that the format can hold, in one of its layouts."""

    @property
    def weight(self) -> Tensor:
        """float32 [out, in]: what the codes and the kept weights stand for."""

    @property
    def damp_percent(self) -> float | None:
        """Damping that made the Hessian's Cholesky factorization succeed, if any."""

    def map_rows(self, change: Callable[[Tensor], Tensor]) -> Self:
        """The result after the same change to the rows of every tensor [out, ...]."""

    def pack(self, kept: Tensor) -> StoredLinear:
        """The tensors of the checkpoint; `kept` is the mask given before, [out, in]."""


@dataclass(frozen=True)
class GridResult:
    """A matrix of codes on grids, and of kept weights."""

    codes: Tensor
    """uint8 [out, in]; the zero-point where a weight is kept."""
    zeros: Tensor
    """uint8 [out, groups]."""
    scales: Tensor
    """16-bit [out, groups]."""
    weight: Tensor
    bits: int
    damp_percent: float | None

    def map_rows(self, change: Callable[[Tensor], Tensor]) -> "GridResult":
        """See `PackableResult`."""
        return GridResult(
            codes=change(self.codes),
            zeros=change(self.zeros),
            scales=change(self.scales),
            weight=change(self.weight),
            bits=self.bits,
            damp_percent=self.damp_percent,
        )

    def pack(self, kept: Tensor) -> PackedLinear:
        """See `PackableResult`."""
        outliers = select_outliers(self.weight.to(self.scales.dtype), kept)
        return pack_linear(self.codes, self.zeros, self.scales, outliers, self.bits)


@dataclass(frozen=True)
class ClusterResult:
    """A matrix of codes in clusters of three, and of kept weights."""

    clusters: Clusters
    """Of rows [out, in]; code 0 where a weight is kept."""
    scales: Tensor
    """16-bit [out, groups], of either sign, never zero."""
    weight: Tensor
    damp_percent: float | None

    def map_rows(self, change: Callable[[Tensor], Tensor]) -> "ClusterResult":
        """See `PackableResult`."""
        clusters = self.clusters
        return ClusterResult(
            clusters=Clusters(change(clusters.codes), change(clusters.indices)),
            scales=change(self.scales),
            weight=change(self.weight),
            damp_percent=self.damp_percent,
        )

    def pack(self, kept: Tensor) -> ClusteredLinear:
        """See `PackableResult`."""
        outliers = select_outliers(self.weight.to(self.scales.dtype), kept)
        return pack_clustered(self.clusters, self.scales, outliers)


@dataclass(frozen=True)
class SimulatedResult:
    """A matrix that the format cannot hold: its values, and what it would take."""

    weight: Tensor
    """float32 [out, in]: what the method's parts stand for."""
    outliers: int
    """Weights kept in 16 bits."""
    stored_bits: int
    """Bits of all its parts, without padding: codes, grids or tables, kept weights."""
    damp_percent: float | None = None
    """As in `PackableResult`."""


def sparse_bits(out_features: int, outliers: int) -> int:
    """Bits of kept weights as the format holds them: row offsets, columns, values."""
    return 32 * (out_features + 1 + outliers)
