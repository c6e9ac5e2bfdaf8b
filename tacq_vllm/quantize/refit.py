"""Scales once more, now that the codes are known.

GPTQ fits a grid before it rounds. Given the codes, a row's output error is a quadratic
function of its scales, so the best ones solve a small linear system.
"""

import torch
from torch import Tensor

_SYSTEM_VALUES = 1 << 24
"""Values of the rows' systems that are solved together."""

_DAMP = 0.01
"""Added to each diagonal, as a share: keeps scales near where the data says little."""


def refit_scales(
    target: Tensor, H: Tensor, steps: Tensor, scales: Tensor, dtype: torch.dtype
) -> Tensor:
    """Scales that minimize tr(D·H·Dᵀ), D = target - steps · scales, row by row.

    Args:
        target: float32 [out, in]: the weights, less those that are kept.
        H: float32 [in, in], the Hessian of the inputs.
        steps: float32 [out, in], code minus zero-point; zero where a weight is kept.
        scales: float32 [out, groups], the scales so far.
        dtype: the 16-bit type that scales are stored in.

    Returns:
        float32 [out, groups], signed as the old ones and representable in `dtype`; a
        row that the new ones would make worse keeps its old ones.
    """
    groups = scales.shape[1]
    rows = max(1, _SYSTEM_VALUES // groups**2)
    parts = zip(target.split(rows), steps.split(rows), scales.split(rows), strict=True)
    return torch.cat([_refit(t, H, c, s, dtype) for t, c, s in parts])


def _refit(
    target: Tensor, H: Tensor, steps: Tensor, scales: Tensor, dtype: torch.dtype
) -> Tensor:
    out_features, groups = scales.shape

    def spread(values: Tensor) -> Tensor:
        grouped = steps.view(out_features, groups, -1) * values.unsqueeze(2)
        return grouped.flatten(1)

    def sums(products: Tensor) -> Tensor:
        return products.view(out_features, groups, -1).sum(2)

    residual = target - spread(scales)
    # The system of each row, for the change of its scales: A [out, groups, groups].
    A = torch.stack(
        [
            sums((part @ H[first : first + part.shape[1]]) * steps)
            for first, part in _group_columns(steps, groups)
        ],
        dim=1,
    )
    b = sums((residual @ H) * steps)
    diagonal = A.diagonal(dim1=1, dim2=2)
    # A group whose codes are all zero-points has nothing to fit.
    diagonal += _DAMP * diagonal + (diagonal == 0)
    change, failed = torch.linalg.solve_ex(A, b)
    refitted = (scales + change).to(dtype).to(torch.float32)
    usable = refitted.isfinite() & (refitted * scales > 0) & (failed == 0).unsqueeze(1)
    refitted = torch.where(usable, refitted, scales)
    after = target - spread(refitted)
    better = ((after @ H) * after).sum(1) < ((residual @ H) * residual).sum(1)
    return torch.where(better.unsqueeze(1), refitted, scales)


def _group_columns(steps: Tensor, groups: int) -> list[tuple[int, Tensor]]:
    size = steps.shape[1] // groups
    return [(index * size, part) for index, part in enumerate(steps.split(size, dim=1))]
