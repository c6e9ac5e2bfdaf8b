"""A weight matrix as a method leaves it."""

from dataclasses import dataclass

from torch import Tensor

from tacq_vllm.format.linear import PackedLinear, pack_linear
from tacq_vllm.format.outliers import select_outliers


@dataclass(frozen=True)
class GridResult:
    """A matrix of codes on grids, and of kept weights: what the format can hold."""

    codes: Tensor
    """uint8 [out, in]; the zero-point where a weight is kept."""
    zeros: Tensor
    """uint8 [out, groups]."""
    scales: Tensor
    """16-bit [out, groups]."""
    weight: Tensor
    """float32 [out, in]: what the codes and the kept weights stand for."""
    damp_percent: float | None
    """Damping that made the Hessian's Cholesky factorization succeed, if any was."""

    def rows(self, rows: slice) -> "GridResult":
        """The result of some rows."""
        return GridResult(
            codes=self.codes[rows],
            zeros=self.zeros[rows],
            scales=self.scales[rows],
            weight=self.weight[rows],
            damp_percent=self.damp_percent,
        )

    def pack(self, kept: Tensor, bits: int) -> PackedLinear:
        """The tensors of the checkpoint; `kept` is the mask that was passed in."""
        outliers = select_outliers(self.weight.to(self.scales.dtype), kept)
        return pack_linear(self.codes, self.zeros, self.scales, outliers, bits)


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
    """As in `GridResult`."""


def sparse_bits(out_features: int, outliers: int) -> int:
    """Bits of kept weights as the format holds them: row offsets, columns, values."""
    return 32 * (out_features + 1 + outliers)
