"""A packed weight in the order in which tensor cores want it, in about as many bytes.

Codes of a block of columns are dealt out anew. What a word's halves hold at one place
are neighbours in the weight, and the same place of all words of a block is one slice of
consecutive columns:

    column  first + j · SLICE + 2 · w + h   is field  j  of half  h  of word  w

So one shift and one mask turn a word into two weights side by side, a slice is
multiplied with consecutive x, and one scale serves all of it. A scale and its
zero-point are one word. The kept weights of a row fill segments of 16, so that a row
with hundreds of them is the work of many threads.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tacq_vllm.format.linear import PackedLinear
from tacq_vllm.format.packing import PLANE_WIDTHS, WORD_BITS, pack_plane, unpack_plane

BLOCK_WORDS = 16
"""Words of a row that are one block."""
SLICE = 2 * BLOCK_WORDS
"""Columns of a slice."""
SEGMENT = 16
"""Kept weights of a segment."""
ROWS_PER_COUNTER = 16
_ROWS_AT_A_TIME = 1024


@dataclass(frozen=True)
class TiledLayout:
    """What is not in the tensors of a tiled linear."""

    bits: int
    dtype: torch.dtype
    """Of scales and kept weights."""


@dataclass(frozen=True)
class TiledLinear:
    """A linear `[out, in]` in the order above; of 2 and 4 bits without a high plane."""

    qweight: Tensor
    """int32 [out, words]: the low plane of the codes."""
    qweight_high: Tensor | None
    grid: Tensor
    """int32 [groups, out]: a scale's 16 bits above its zero-point."""
    segment_starts: Tensor
    """int32 [out + 1]: the first segment of each row's kept weights, and the end."""
    segments: Tensor
    """int32 [segments, SEGMENT]: columns and values as in the outlier table; what a
    row leaves over is 0, which adds nothing."""
    counters: Tensor
    """int32 [out / ROWS_PER_COUNTER]: where programs count that add to the same rows.

    They are zero between kernels; a weight is multiplied by one stream at a time.
    """
    bits: int
    in_features: int
    dtype: torch.dtype
    """Of scales and kept weights."""

    @property
    def layout(self) -> TiledLayout:
        """How its codes are stored."""
        return TiledLayout(self.bits, self.dtype)

    @property
    def out_features(self) -> int:
        """Rows of the weight."""
        return self.qweight.shape[0]

    @property
    def group_size(self) -> int:
        """Input columns that share a scale."""
        return self.in_features // self.grid.shape[0]

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by their names."""
        named = {
            "qweight": self.qweight,
            "qweight_high": self.qweight_high,
            "grid": self.grid,
            "segment_starts": self.segment_starts,
            "segments": self.segments,
            "counters": self.counters,
        }
        return {name: tensor for name, tensor in named.items() if tensor is not None}


def can_tile(packed: PackedLinear) -> bool:
    """Whether blocks and slices fall between columns and groups."""
    size, groups = packed.group_size, packed.scales.shape[1]
    return packed.in_features % block_columns(packed.bits) == 0 and (
        groups == 1 or (size >= SLICE and size.bit_count() == 1)
    )


def tile(packed: PackedLinear) -> TiledLinear:
    """Deal out the codes of a weight anew; `can_tile` says of which."""
    widths = PLANE_WIDTHS[packed.bits]
    planes = [
        torch.cat(list(_tile_plane(plane, width, packed.in_features)))
        for plane, width in zip(packed.weight_planes, widths, strict=True)
    ]
    starts, segments = _fill_segments(packed.outliers, packed.out_features)
    scales = packed.scales.view(torch.int16).to(torch.int32)
    return TiledLinear(
        qweight=planes[0],
        qweight_high=planes[1] if len(planes) > 1 else None,
        grid=(scales << 16 | packed.zeros.to(torch.int32)).T.contiguous(),
        segment_starts=starts,
        segments=segments,
        counters=packed.outliers.new_zeros(-(-packed.out_features // ROWS_PER_COUNTER)),
        bits=packed.bits,
        in_features=packed.in_features,
        dtype=packed.scales.dtype,
    )


def block_columns(bits: int) -> int:
    """Columns of a block of the plane with the narrowest fields."""
    return WORD_BITS // min(PLANE_WIDTHS[bits]) * BLOCK_WORDS


def _tile_plane(plane: Tensor, width: int, in_features: int) -> Iterator[Tensor]:
    """A plane in its new order, some rows at a time."""
    fields = WORD_BITS // width // 2
    for words in plane.split(_ROWS_AT_A_TIME):
        codes = unpack_plane(words, width, in_features)
        blocks = codes.view(len(words), -1, fields, BLOCK_WORDS, 2)
        dealt = blocks.permute(0, 1, 3, 4, 2).reshape(len(words), in_features)
        yield pack_plane(dealt, width)


def _fill_segments(table: Tensor, out_features: int) -> tuple[Tensor, Tensor]:
    """Segments of the rows of an outlier table: where they start, and their entries."""
    starts, entries = table[: out_features + 1].long(), table[out_features + 1 :]
    counts = starts.diff()
    ends = ((counts + SEGMENT - 1) // SEGMENT).cumsum(0)
    segment_starts = torch.cat((ends.new_zeros(1), ends))
    segments = table.new_zeros(int(ends[-1]), SEGMENT)
    first_places = (segment_starts[:-1] * SEGMENT - starts[:-1]).repeat_interleave(
        counts
    )
    places = first_places + torch.arange(len(entries), device=table.device)
    segments.view(-1)[places] = entries
    return segment_starts.to(torch.int32), segments
