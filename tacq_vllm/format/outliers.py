"""The table of weights kept in 16 bits (SPEC.md, "Outliers").

One int32 tensor per linear, in compressed-sparse-row order:
`[row_offsets (out + 1) | entries (nnz)]`, an entry being the column in its low
16 bits and the value's bit pattern in its high 16 bits.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

MAX_IN_FEATURES = 1 << 16
"""A column index has 16 bits."""

MAX_WEIGHT = 2.0**127
"""What a code stands for, and a kept value, are smaller: their sum is finite."""


@dataclass(frozen=True)
class Outliers:
    """Kept weights of a linear `[out, in]` in row order, columns ascending in a row."""

    row_offsets: Tensor
    """int32 [out + 1]: the entries of row r are row_offsets[r] to row_offsets[r+1]."""
    columns: Tensor
    """int32 [nnz]."""
    values: Tensor
    """float16 or bfloat16 [nnz]."""

    @property
    def nnz(self) -> int:
        """Number of kept weights."""
        return self.columns.numel()

    @property
    def rows(self) -> Tensor:
        """int64 [nnz]: the row of each entry."""
        counts = self.row_offsets.diff().to(torch.int64)
        return torch.repeat_interleave(counts)


def outliers_of_rows(
    rows: Tensor, columns: Tensor, values: Tensor, out_features: int
) -> Outliers:
    """The table of kept weights that are given in row order.

    Args:
        rows: int64 [nnz], ascending.
        columns: integers [nnz], ascending in a row.
        values: float16 or bfloat16 [nnz].
        out_features: rows of the weight.
    """
    counts = torch.bincount(rows, minlength=out_features)
    offsets = torch.cat((counts.new_zeros(1), counts.cumsum(0))).to(torch.int32)
    return Outliers(offsets, columns.to(torch.int32), values)


def select_outliers(values: Tensor, mask: Tensor) -> Outliers:
    """Take the weights at `mask` out of `values`.

    Args:
        values: float16 or bfloat16 [out, in].
        mask: bool [out, in].
    """
    rows, columns = mask.nonzero(as_tuple=True)
    return outliers_of_rows(rows, columns, values[rows, columns], mask.shape[0])


def encode_outliers(outliers: Outliers) -> Tensor:
    """Write the table as the checkpoint stores it: int32 [out + 1 + nnz]."""
    value_bits = outliers.values.view(torch.int16).to(torch.int32)
    entries = (value_bits << 16) | outliers.columns
    return torch.cat((outliers.row_offsets, entries))


def decode_outliers(table: Tensor, out_features: int, dtype: torch.dtype) -> Outliers:
    """Read a table that `check_outliers` has accepted.

    Args:
        table: int32 [out + 1 + nnz].
        out_features: rows of the weight.
        dtype: float16 or bfloat16, the type of the values.
    """
    row_offsets, entries = table[: out_features + 1], table[out_features + 1 :]
    value_bits = (entries >> 16).to(torch.int16)
    return Outliers(row_offsets, entries & 0xFFFF, value_bits.view(dtype))


def slice_outlier_rows(outliers: Outliers, start: int, stop: int) -> Outliers:
    """Keep rows [start, stop): a cut of a column-parallel linear."""
    offsets = outliers.row_offsets[start : stop + 1]
    first, last = int(offsets[0]), int(offsets[-1])
    return Outliers(
        offsets - first, outliers.columns[first:last], outliers.values[first:last]
    )


def slice_outlier_columns(outliers: Outliers, start: int, stop: int) -> Outliers:
    """Keep columns [start, stop), renumbered from 0: a cut of a row-parallel linear."""
    kept = (outliers.columns >= start) & (outliers.columns < stop)
    return outliers_of_rows(
        outliers.rows[kept],
        outliers.columns[kept] - start,
        outliers.values[kept],
        outliers.row_offsets.numel() - 1,
    )


def merge_outliers(parts: list[Outliers]) -> Outliers:
    """Stack the tables of linears that share their input, as a fused linear does."""
    offsets = [parts[0].row_offsets[:1]]
    total = 0
    for part in parts:
        offsets.append(part.row_offsets[1:] + total)
        total += part.nnz
    return Outliers(
        torch.cat(offsets),
        torch.cat([part.columns for part in parts]),
        torch.cat([part.values for part in parts]),
    )


def check_outliers(
    table: Tensor, out_features: int, in_features: int, dtype: torch.dtype
) -> str | None:
    """Say what is wrong with a stored table, or None if a kernel may read it.

    Args:
        table: int32 [out + 1 + nnz]; anything may come here.
        out_features: rows of the weight.
        in_features: columns of the weight.
        dtype: float16 or bfloat16, the type of the values.
    """
    if table.dtype != torch.int32 or table.ndim != 1:
        return f"is {table.dtype} {list(table.shape)}, not a flat int32 table"
    if table.numel() < out_features + 1:
        return f"has {table.numel()} words, fewer than {out_features + 1} row offsets"
    outliers = decode_outliers(table, out_features, dtype)
    offsets, columns = outliers.row_offsets, outliers.columns
    if int(offsets[0]) != 0 or int(offsets[-1]) != outliers.nnz:
        return (
            f"row offsets run from {int(offsets[0])} to {int(offsets[-1])}, "
            f"not from 0 to {outliers.nnz}"
        )
    # Not their differences, which could wrap around.
    if bool((offsets[1:] < offsets[:-1]).any()):
        return "row offsets run backwards"
    if outliers.nnz == 0:
        return None
    if int(columns.max()) >= in_features:
        return f"column {int(columns.max())} is outside {in_features} input features"
    positions = outliers.rows * in_features + columns
    if bool((positions.diff() <= 0).any()):
        return "columns of a row are not strictly ascending"
    if not bool(outliers.values.isfinite().all()):
        return "a kept value is not finite"
    if float(outliers.values.abs().max()) >= MAX_WEIGHT:
        return "a kept value is too large to be a weight"
    return None
