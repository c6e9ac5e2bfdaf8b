"""Scales and zero-points of one group of columns (GPTQ; TaCQ paper, equation 1)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from tacq_vllm.config import GptqConfig
from tacq_vllm.quantize.errors import check_finite

GRID_SETTINGS = {"grid_steps", "grid_max_shrink", "grid_norm"}
"""Fields of `GptqConfig` that the search of a grid depends on."""

_CHUNK_WEIGHTS = 1 << 16
"""Weights searched at a time, so that the loop works in cache."""

_COARSE = 4
"""Every so many shrink factors are tried first."""


@dataclass(frozen=True)
class Grid:
    """An asymmetric grid per row: value = (code - zero) · scale."""

    scales: Tensor
    """float32 [out], representable in the storage type, never zero."""
    zeros: Tensor
    """float32 [out], integers in [0, max_code]."""
    max_code: int

    def codes(self, W: Tensor) -> Tensor:
        """Codes (float32 integers) of W, [out] or [out, n] as `scales` broadcast."""
        return (W / self.scales).round_().add_(self.zeros).clamp_(0, self.max_code)

    def values(self, codes: Tensor) -> Tensor:
        """What codes stand for, float32 [out] or [out, n] as `scales` broadcast."""
        return (codes - self.zeros) * self.scales

    def over_columns(self) -> "Grid":
        """The same grid, to broadcast over [out, n]."""
        return Grid(self.scales.unsqueeze(1), self.zeros.unsqueeze(1), self.max_code)


def fit_grid(
    W: Tensor, kept: Tensor | None, bits: int, dtype: torch.dtype, config: GptqConfig
) -> Grid:
    """Search each row's grid that rounds W with the least error.

    The range is that of the row with zero included, shrunk by the best of a number of
    factors; a row's kept weights are replaced by the mean of its others (TaCQ
    reference; SpQR).

    Args:
        W: float32 [out, n].
        kept: bool [out, n], the weights that stay in 16 bits, or None.
        bits: bits of a code.
        dtype: the 16-bit type that scales are stored in.
        config: number of steps, smallest shrink factor, norm of the error.

    Raises:
        QuantizeError: a row has no grid that the 16-bit type can hold.
    """
    if kept is not None and bool(kept.any()):
        others = (~kept).sum(1).clamp(min=1)
        means = W.masked_fill(kept, 0.0).sum(1) / others
        W = torch.where(kept, means.unsqueeze(1), W)
    rows = max(1, _CHUNK_WEIGHTS // W.shape[1])
    parts = [_search(chunk, bits, dtype, config) for chunk in W.split(rows)]
    return Grid(
        torch.cat([part.scales for part in parts]),
        torch.cat([part.zeros for part in parts]),
        parts[0].max_code,
    )


def _search(W: Tensor, bits: int, dtype: torch.dtype, config: GptqConfig) -> Grid:
    """Try every `_COARSE`-th shrink factor, then each row the ones around its best."""
    max_code = 2**bits - 1
    low = W.amin(1).clamp(max=0.0)
    high = W.amax(1).clamp(min=0.0)
    best_error = torch.full_like(low, torch.inf)
    best_step = torch.zeros_like(low)
    best = Grid(torch.ones_like(low), torch.zeros_like(low), max_code)

    def attempt(step: Tensor) -> None:
        nonlocal best_error, best_step, best
        step = step.clamp(0, config.grid_steps - 1)
        shrink = 1 - config.grid_max_shrink * step / config.grid_steps
        scales = (shrink * (high - low) / max_code).to(dtype).to(torch.float32)
        # A row of zeros, or one that the 16-bit type cannot scale, has only code 0.
        scales = torch.where(scales > 0, scales, 1.0)
        zeros = (-shrink * low / scales).round_().clamp_(0, max_code)
        grid = Grid(scales, zeros, max_code).over_columns()
        error = grid.values(grid.codes(W)).sub_(W).abs_().pow_(config.grid_norm).sum(1)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_step = torch.where(better, step, best_step)
        best = Grid(
            torch.where(better, scales, best.scales),
            torch.where(better, zeros, best.zeros),
            max_code,
        )

    for step in range(0, config.grid_steps, _COARSE):
        attempt(torch.full_like(low, step))
    center = best_step
    for offset in range(1 - _COARSE, _COARSE):
        if offset:
            attempt(center + offset)
    check_finite(best_error, dtype)
    return best
