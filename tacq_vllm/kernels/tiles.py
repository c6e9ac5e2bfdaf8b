"""A packed weight in the order in which tensor cores want it, in about as many bytes.

Codes of a block of columns are dealt out anew. What a word's halves hold at one place
are neighbours in the weight, and the same place of all words of a block is one slice of
consecutive columns; the low plane has 32 words in a block, the high one of 3 bits 16:

    column  first + j · 2 · words + 2 · w + h   is field  j  of half  h  of word  w

So one mask turns a word into two weights side by side, and the words that a thread
loads at once are what tensor cores take from it. The last block is filled up with
zeros. A scale and its zero-point are one word, those of 16 rows are neighbours. The
kept weights of 16 rows lie together by their columns, in segments of 32; of rows with
very many, what is over is the work of other programs. Clusters become codes of 3 bits,
which all of theirs are.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tacq_vllm.format.packing import PLANE_WIDTHS, WORD_BITS

BLOCK_WORDS = 32
"""Words of a row's low plane that are one block."""
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
        others = dict(tensors)
        high = others.pop("qweight_high", None)
        return TiledLinear(
            **others,
            qweight_high=high,
            bits=self.bits,
            dtype=self.dtype,
            in_features=in_features,
        )


@dataclass(frozen=True)
class TiledLinear:
    """A linear `[out, in]` in the order above; of 2 and 4 bits without a high plane."""

    qweight: Tensor
    """int32 [out, words]: the low plane of the codes."""
    qweight_high: Tensor | None
    grid: Tensor
    """int32 [out / ROWS, groups, ROWS]: a scale's 16 bits above its zero-point's; 0 for
    rows and groups that the weight does not have."""
    segment_starts: Tensor
    """int32 [out / ROWS + 1]: the first segment of rows' kept weights, and the end."""
    segment_columns: Tensor
    """int32 [segments]: columns before the first one of a segment's panel."""
    segments: Tensor
    """int32 [segments, SEGMENT]: a value's 16 bits, the column in its panel in 12 and
    the row among ROWS in 4; what rows leave over is 0, which adds nothing."""
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
    def planes(self) -> tuple[Tensor, ...]:
        """The planes of the codes, lowest bits first: int32 [out, words] each."""
        high = self.qweight_high
        return (self.qweight,) if high is None else (self.qweight, high)

    @property
    def blocks(self) -> int:
        """Blocks of columns."""
        return self.qweight.shape[1] // BLOCK_WORDS

    @property
    def group_size(self) -> int:
        """Columns that share a scale, where there are several groups; else 0."""
        groups = self.grid.shape[1]
        return 0 if groups == 1 else self.blocks * block_columns(self.bits) // groups

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by their names."""
        named = {
            "qweight": self.qweight,
            "qweight_high": self.qweight_high,
            "grid": self.grid,
            "segment_starts": self.segment_starts,
            "segment_columns": self.segment_columns,
            "segments": self.segments,
            "job_starts": self.job_starts,
            "job_blocks": self.job_blocks,
            "counters": self.counters,
        }
        return {name: tensor for name, tensor in named.items() if tensor is not None}


def block_columns(bits: int) -> int:
    """Columns of a block."""
    return WORD_BITS // PLANE_WIDTHS[bits][0] * BLOCK_WORDS
