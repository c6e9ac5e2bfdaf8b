"""What the CPU kernels know of a weight: how its rows are stored, and where.

A layout of codes is a kind of `Rows`. Kept weights are in all of them the same.
"""

import functools
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch

Load = Callable[[Any, Any], Any]
"""Reads elements of a type, of one or more groups, from an array at an address."""


class Row(Protocol):
    """LLVM values: addresses of one row's parts."""

    @property
    def scales(self) -> Any:
        """Of its scales."""

    @property
    def offsets(self) -> Any:
        """Of the number of its first kept weight; that of the next row follows."""

    @property
    def entries(self) -> Any:
        """Of the kept weights of all rows."""


class Rows(Hashable, Protocol):
    """LLVM code that reads rows that are stored in one way."""

    @property
    def dtype(self) -> torch.dtype:
        """The 16-bit type of scales and kept weights."""

    @property
    def stride(self) -> int:
        """Vectors that a set of columns makes.

        A lane of theirs has 4 · stride neighbouring columns: its four bytes of vector k
        are the columns k, k + stride, k + 2 stride and k + 3 stride of these.
        """

    @property
    def levels(self) -> int:
        """How many codes there are, from 0 on; 16 at most."""

    @property
    def addresses(self) -> int:
        """Tensors of a weight, whose addresses are every kernel's last arguments."""

    @property
    def row_type(self) -> Any:
        """What the finder returns, as numba knows it."""

    def finder(self) -> Any:
        """Compile what finds a row.

        It takes the tensors' addresses, the row's number, and the numbers of columns,
        groups and rows of the weight.
        """

    def unpack(self, builder: Any, values: Any) -> Row:
        """The row that an intrinsic was given."""

    def codes(self, builder: Any, row: Any, index: Any, rest: Any) -> list[Any]:
        """The codes of a set of columns, one per byte: `stride` vectors.

        Args:
            builder: what appends instructions.
            row: the row.
            index: the set's number.
            rest: how many of its columns exist; None: all.
        """

    def prefetch(self, builder: Any, row: Any, index: Any) -> None:
        """Ask for the codes of a set of columns, which need not exist."""

    def grid(self, builder: Any, row: Any, load: Load) -> tuple[Any, Any]:
        """The scale, a float, and the zero-point, an integer, of one or more groups."""


@dataclass(frozen=True, eq=False)
class WeightKind:
    """How weights are stored, and how large they are; `weight_kind` makes it."""

    rows: Rows
    out_features: int
    columns: int
    """Columns that are stored: x has as many, zeros where the weight has none."""
    groups: int

    @property
    def group_size(self) -> int:
        """Columns that share a scale."""
        return self.columns // self.groups


@functools.cache
def weight_kind(
    stored: Callable[..., Rows],
    details: tuple[Any, ...],
    out_features: int,
    columns: int,
    groups: int,
) -> WeightKind:
    """The one object for weights that are alike, by which calls find what they share.

    Args:
        stored: the kind of `Rows`.
        details: what that is made of.
        out_features: rows of the weight.
        columns: that are stored.
        groups: of a row.
    """
    return WeightKind(stored(*details), out_features, columns, groups)


class CpuWeight(NamedTuple):
    """A weight as the CPU kernels take it."""

    kind: WeightKind
    addresses: tuple[int, ...]
