"""GPTQ of one weight matrix, with some weights kept in 16 bits.

GPTQ: arXiv 2210.17323; kept weights: TaCQ, arXiv 2504.07389, section 3 and
appendix D.
"""

import torch
from torch import Tensor

from tacq_vllm.config import GptqConfig
from tacq_vllm.quantize.columns import lazy_block, round_columns
from tacq_vllm.quantize.errors import QuantizeError, check_finite
from tacq_vllm.quantize.grid import Grid, fit_grid
from tacq_vllm.quantize.refit import refit_scales
from tacq_vllm.quantize.result import GridResult

MAX_DAMP = 1.0
"""Damping, as a share of the mean diagonal, past which a Hessian is refused."""


_HESSIAN_COLUMNS = 512
"""Columns of a block of the symmetric product, of which one half is computed."""

_HESSIAN_TOKENS = 512
"""Tokens that are multiplied at a time. Of longer sums a matrix product gives some to
each thread, so that the result would depend on their number."""


class Hessian:
    """The second-moment matrix of a linear's inputs, summed over tokens."""

    def __init__(self, in_features: int, device: torch.device) -> None:
        self.total = torch.zeros(
            in_features, in_features, dtype=torch.float64, device=device
        )
        """The sum so far: its upper triangle; of what lies below, the diagonal's blocks
        alone. In float64 the order of additions, and so the number of processes, is no
        matter."""
        self.tokens = torch.zeros((), dtype=torch.int64, device=device)

    def add(self, x: Tensor) -> None:
        """Add inputs [..., in]."""
        x = x.reshape(-1, x.shape[-1]).to(torch.float32)
        self.tokens += x.shape[0]
        for part in x.split(_HESSIAN_TOKENS):
            for start in range(0, part.shape[1], _HESSIAN_COLUMNS):
                stop = start + _HESSIAN_COLUMNS
                product = part[:, start:stop].T @ part[:, start:]
                self.total[start:stop, start:] += product

    def mean(self) -> Tensor:
        """The sum over its number of tokens: float32 [in, in]."""
        mean = torch.zeros_like(self.total, dtype=torch.float32)
        for start in range(0, len(mean), _HESSIAN_COLUMNS):
            stop = start + _HESSIAN_COLUMNS
            upper = (self.total[start:stop, start:].triu() / self.tokens).float()
            mean[start:stop, start:] += upper
            mean[start:, start:stop] += upper.triu(1).T
        return mean


def quantize_matrix(
    W: Tensor,
    H: Tensor,
    kept: Tensor | None,
    *,
    bits: int,
    group_size: int,
    dtype: torch.dtype,
    keep_original: bool,
    config: GptqConfig,
) -> GridResult:
    """Round W column by column, moving each column's error to those that follow.

    Args:
        W: float32 [out, in]; rows of linears that share their input may be stacked.
        H: float32 [in, in], from `Hessian.mean`.
        kept: bool [out, in], the weights to store in 16 bits, or None.
        bits: bits of a code.
        group_size: columns of a grid, or -1.
        dtype: the 16-bit type of scales and kept weights.
        keep_original: keep a weight as it is in W, not as compensation has moved it.
        config: damping, block size and grid search.

    Raises:
        QuantizeError: the Hessian stays singular at the largest damping, or a scale or
            a kept weight does not fit the 16-bit type.
    """
    out_features, in_features = W.shape
    size = in_features if group_size == -1 else group_size

    def fit_group(current: Tensor, first: int) -> Grid:
        """Fit the grid of the group whose first column is `first`."""
        mask = None if kept is None else kept[:, first : first + size]
        return fit_grid(current, mask, bits, dtype, config)

    order = torch.arange(in_features, device=W.device)
    grids: dict[int, Grid] = {}
    if config.activation_order:
        order = H.diagonal().argsort(descending=True, stable=True)
        for first in range(0, in_features, size):
            grids[first // size] = fit_group(W[:, first : first + size], first)
    U, damp_percent = inverse_factor(H[order][:, order], config.damp_percent)

    columns = order.tolist()
    codes = torch.empty(in_features, out_features, dtype=torch.uint8, device=W.device)
    exact = torch.zeros(in_features, out_features, device=W.device)

    def round_column(step: int, rest: Tensor) -> Tensor:
        column, w = columns[step], rest[step]
        group = column // size
        if group not in grids:
            grids[group] = fit_group(rest[step : step + size].T, column)
        grid = grids[group]
        code = grid.codes(w)
        if kept is not None:
            mask = kept[:, column]
            code = torch.where(mask, grid.zeros, code)
            value = W[:, column] if keep_original else w
            exact[column] = torch.where(mask, value.to(dtype).float(), 0.0)
        codes[column] = code
        return grid.values(code) + exact[column]

    block_size = lazy_block(config.block_size, size, in_features)
    round_columns(W, U, order, block_size, round_column)
    fitted = [grids[group] for group in range(in_features // size)]
    zeros = torch.stack([grid.zeros for grid in fitted], 1)
    scales = torch.stack([grid.scales for grid in fitted], 1)
    codes, exact = codes.T.contiguous(), exact.T.contiguous()
    steps = codes - zeros.repeat_interleave(size, dim=1)
    if config.refit_scales:
        scales = refit_scales(W - exact, H, steps, scales, dtype)
    weight = steps * scales.repeat_interleave(size, dim=1) + exact
    check_finite(weight.to(dtype), dtype)
    return GridResult(
        codes=codes,
        zeros=zeros.to(torch.uint8),
        scales=scales.to(dtype),
        weight=weight,
        bits=bits,
        damp_percent=damp_percent,
    )


def inverse_factor(H: Tensor, damp_percent: float) -> tuple[Tensor, float]:
    """Upper Cholesky factor of the damped Hessian's inverse, and the damping used.

    Both matrices are float32 [in, in] (GPTQ paper, algorithm 1).

    An input that is always zero gets the others' mean diagonal, so that its weights are
    rounded to the nearest value. Where the factorization fails, damping doubles.

    Factors in float64: GPTQ makes other codes of the smallest difference, and in
    float32 the result would depend on the number of threads.

    Raises:
        QuantizeError: it still fails at `MAX_DAMP`, or H is not finite.
    """
    if not bool(H.isfinite().all()):
        raise QuantizeError("the Hessian is not finite: NaN or overflow in the inputs")
    diagonal = H.diagonal()
    live = int(diagonal.count_nonzero())
    mean = diagonal.mean() * (len(H) / live) if live else H.new_ones(())
    while damp_percent <= MAX_DAMP:
        # One name for all steps: no more than two of them are in memory at a time.
        M = H.to(torch.float64, copy=True)
        M.diagonal().masked_fill_(diagonal == 0, mean).add_(damp_percent * mean)
        M, failed = torch.linalg.cholesky_ex(M)
        if not failed:
            M = torch.cholesky_inverse(M)
            M, failed = torch.linalg.cholesky_ex(M, upper=True)
            if not failed:
                return M.to(torch.float32), damp_percent
        damp_percent *= 2
    raise QuantizeError(
        f"the Hessian is singular even when damped by {MAX_DAMP:.0%} of its mean "
        "diagonal: use more calibration tokens"
    )


def relative_error(W: Tensor, quantized: Tensor, H: Tensor | None) -> float:
    """Squared output error on the calibration inputs over the squared output.

    tr(D·H·Dᵀ) / tr(W·H·Wᵀ) with D = W - quantized, all float32 [out, in]; without
    inputs, ‖D‖² / ‖W‖².
    """
    D = W - quantized
    error, signal = ((M if H is None else M @ H).mul(M).sum() for M in (D, W))
    return float(error / signal) if signal > 0 else 0.0
