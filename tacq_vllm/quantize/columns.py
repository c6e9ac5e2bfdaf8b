"""GPTQ's column loop: each column's error is moved to the columns that follow.

GPTQ: arXiv 2210.17323, algorithm 1. What rounds a column is the caller's.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

RoundColumn = Callable[[int, Tensor], Tensor]
"""Given a step and the weights [in, out] in the order of rounding, the column of that
step rounded: [out]. Rows before the step are rounded; the others hold the errors of all
that went before, in the step's own group at least."""


def round_columns(
    W: Tensor,
    U: Tensor,
    order: Tensor,
    block_size: int,
    round_column: RoundColumn,
) -> Tensor:
    """Round W column by column.

    Args:
        W: float32 [out, in].
        U: float32 [in, in], the upper Cholesky factor of the inverse Hessian whose
            rows and columns are in the order of rounding.
        order: int64 [in], the columns in the order of rounding.
        block_size: columns between two updates of all that follow (`lazy_block`).
        round_column: rounds a column.

    Returns:
        float32 [out, in]: what `round_column` gave, each column in its own place.
    """
    in_features = W.shape[1]
    # A column as a contiguous row: rounded up to the step, still to round from there.
    rest = W.T[order].contiguous()
    for start in range(0, in_features, block_size):
        stop = min(start + block_size, in_features)
        errors = torch.empty(stop - start, W.shape[0], device=W.device)
        for step in range(start, stop):
            rounded = round_column(step, rest)
            error = (rest[step] - rounded) / U[step, step]
            rest[step] = rounded
            rest[step + 1 : stop].addr_(U[step, step + 1 : stop], error, alpha=-1)
            errors[step - start] = error
        rest[stop:].addmm_(U[start:stop, stop:].T, errors, alpha=-1)
    result = torch.empty_like(rest)
    result[order] = rest
    return result.T.contiguous()


def lazy_block(wanted: int, group_size: int, in_features: int) -> int:
    """Columns per block such that every group lies in one, or starts at one.

    Either way a grid is fitted to weights that hold all earlier columns' errors.
    """
    if group_size == in_features:
        return wanted
    if group_size <= wanted:
        return group_size * (wanted // group_size)
    return math.gcd(group_size, wanted)
