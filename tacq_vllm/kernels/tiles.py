"""A packed weight in the order in which tensor cores want it, in about as many bytes.

Codes of a block of columns are dealt out anew. A row's words of a block are parts of 16
words; what the halves of words hold at one place are neighbours in the weight, and the
same place of all words of a part is one strip of 32 consecutive columns:

    column  32 · strip + 2 · w + h   is one field of half  h  of word  w  of one part

So one mask turns a word into two weights side by side, and the words that a thread
loads at once are what tensor cores take from it. A half has 8 fields of 2 bits, or 4 of
4, in two parts. In three parts it has 5 of 3 bits, and a bit is over: the three of the
same half are one more field, whose lowest bit is the first part's. `part_of_strip` and
`field_of_strip` say where a strip is. The last block is filled up with zeros.

A scale and its zero-point are one word. Those of 16 rows lie together, a row's beside
that of eight rows on: a thread multiplies the codes of both. The kept weights of 16
rows lie together by their columns, in segments of 32; of rows with very many, what is
over is the work of other programs. Clusters become codes of 3 bits, which all of theirs
are.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

PART_WORDS = 16
"""Words of a row that are a part of a block."""
STRIP = 2 * PART_WORDS
"""Columns of a strip."""
ROWS = 16
"""Rows whose scales are neighbours, and whose kept weights lie together."""
TOKEN_BLOCKS = 2
"""Blocks of tokens that are multiplied in one launch, at most."""
SEGMENT = 32
"""Kept weights of a segment."""
PANEL = 4096
"""Columns of which a segment's kept weights are, at most."""
OWN_SEGMENTS = 32
"""Segments of a block of rows that its own programs multiply, at most."""
JOB_SEGMENTS = 8
"""Segments that one of the other programs multiplies, at most."""


@dataclass(frozen=True)
class TiledLayout:
    """What is not in the tensors of a tiled linear."""

    bits: int
    dtype: torch.dtype
    """Of scales and kept weights."""

    def linear(self, tensors: Mapping[str, Tensor], in_features: int) -> "TiledLinear":
        """Invert `TiledLinear.tensors`."""
        return TiledLinear(
            **tensors,
            bits=self.bits,
            dtype=self.dtype,
            in_features=in_features,
        )


@dataclass(frozen=True)
class TiledLinear:
    """A linear `[out, in]` in the order above."""

    qweight: Tensor
    """int32 [out, words]: the codes."""
    grid: Tensor
    """int32 [out / ROWS, groups, ROWS / 2, 2]: a scale's 16 bits above its zero-point;
    the last index is the half of rows. 0 for what the weight does not have."""
    segment_starts: Tensor
    """int32 [out / ROWS + 1]: the first segment of rows' kept weights, and the end."""
    segment_columns: Tensor
    """int32 [segments]: columns before the first one of a segment's panel."""
    segments: Tensor
    """int32 [segments, SEGMENT]: a value's 16 bits, the row among ROWS in 4 and the
    column in its panel in 12; what rows leave over is 0, which adds nothing."""
    job_starts: Tensor
    """int32 [out / ROWS + 1]: the first of the jobs that rows have for other programs,
    JOB_SEGMENTS of what is over OWN_SEGMENTS each, and the end."""
    job_blocks: Tensor
    """int32 [jobs]: the block of rows of each."""
    counters: Tensor
    """int32 [out / ROWS, TOKEN_BLOCKS]: where programs count that add to the same sums.

    They are zero between kernels; a weight is multiplied by one stream at a time.
    """
    bits: int
    dtype: torch.dtype
    """Of scales and kept weights."""
    in_features: int

    @property
    def layout(self) -> TiledLayout:
        """How its codes are stored."""
        return TiledLayout(self.bits, self.dtype)

    @property
    def out_features(self) -> int:
        """Rows of the weight."""
        return self.qweight.shape[0]

    @property
    def blocks(self) -> int:
        """Blocks of columns."""
        return self.qweight.shape[1] // block_words(self.bits)

    @property
    def group_size(self) -> int:
        """Columns that share a scale, where there are several groups; else 0."""
        groups = self.grid.shape[1]
        return 0 if groups == 1 else self.blocks * block_columns(self.bits) // groups

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by their names."""
        return {
            "qweight": self.qweight,
            "grid": self.grid,
            "segment_starts": self.segment_starts,
            "segment_columns": self.segment_columns,
            "segments": self.segments,
            "job_starts": self.job_starts,
            "job_blocks": self.job_blocks,
            "counters": self.counters,
        }


def block_words(bits: int) -> int:
    """Words of a row that are one block: three parts of 3 bits, else two."""
    return 48 if bits == 3 else 32


def block_columns(bits: int) -> int:
    """Columns of a block, which its words have bits for."""
    return 256 if bits == 4 else 512


def part_of_strip(strip: int, bits: int) -> int:
    """The part of a block that has a strip; of field 5 of 3 bits, all have a bit."""
    if bits == 3:
        return (0, 1, 0, 1, 2, 0, 2, 0, 1, 2, 1, 2, 0, 1, 2, 0)[strip]
    return strip % 2


def field_of_strip(strip: int, bits: int) -> int:
    """The field of halves of words that a strip is in.

    Two strips that begin at a multiple of 64 columns, and may be one group, are in
    fields that kernels treat alike: of 3 bits both are even, or field 5, or both odd.
    """
    if bits == 3:
        return (0, 0, 1, 1, 0, 2, 1, 3, 2, 2, 3, 3, 4, 4, 4, 5)[strip]
    return strip // 2
