"""A packed weight in the order in which tensor cores want it, in about as many bytes.

Codes of a block of columns are dealt out anew. What a word's halves hold at one place
are neighbours in the weight, and the same place of all words of a block is one slice of
consecutive columns; the low plane has 32 words in a block, the high one of 3 bits 16:

    column  first + j · 2 · words + 2 · w + h   is field  j  of half  h  of word  w

So one mask turns a word into two weights side by side, and the words that a thread
loads at once are what tensor cores take from it. The last block is filled up with
zeros. A scale and its zero-point are one word, those of 16 rows are neighbours. The
kept weights of a row fill segments of 16, so that a row with hundreds of them is the
work of many threads. Clusters become codes of 3 bits, which all of theirs are.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from tacq_vllm.format.clustered import ClusteredLinear
from tacq_vllm.format.clusters import WIDE
from tacq_vllm.format.linear import PackedLinear
from tacq_vllm.format.packing import (
    PLANE_WIDTHS,
    WORD_BITS,
    pack_plane,
    unpack_codes,
)

BLOCK_WORDS = 32
"""Words of a row's low plane that are one block."""
SLICE = 2 * BLOCK_WORDS
"""Columns that have the same place in a block's words."""
ROWS = 16
"""Rows whose scales are neighbours, and that programs count together."""
TOKEN_BLOCKS = 4
"""Blocks of tokens that are multiplied in one launch, at most."""
SEGMENT = 16
"""Kept weights of a segment."""
_SMALLEST_GROUP = 32
_LARGEST_PADDING = 1.25
"""Columns with what fills the last block, by those of the weight."""
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
    """int32 [out / ROWS, groups, ROWS]: a scale's 16 bits above its zero-point's, which
    is a bfloat16; 0 for rows and groups that the weight does not have."""
    segment_starts: Tensor
    """int32 [out + 1]: the first segment of each row's kept weights, and the end."""
    segments: Tensor
    """int32 [segments, SEGMENT]: columns and values as in the outlier table; what a
    row leaves over is 0, which adds nothing."""
    counters: Tensor
    """int32 [out / ROWS, TOKEN_BLOCKS]: where programs count that add to the same sums.

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
            "segments": self.segments,
            "counters": self.counters,
        }
        return {name: tensor for name, tensor in named.items() if tensor is not None}


def can_tile(linear: PackedLinear | ClusteredLinear) -> bool:
    """Whether groups fit into blocks, and the last block is not much too large."""
    size, groups = linear.group_size, linear.scales.shape[1]
    has_groups = size >= _SMALLEST_GROUP and size.bit_count() == 1
    if (groups > 1 and not has_groups) or linear.in_features % _SMALLEST_GROUP:
        return False
    return _padded_columns(linear) <= _LARGEST_PADDING * linear.in_features


def tile(linear: PackedLinear | ClusteredLinear) -> TiledLinear:
    """Deal out the codes of a weight anew; `can_tile` says of which."""
    parts = [
        _tile_rows(linear, start, min(start + _ROWS_AT_A_TIME, linear.out_features))
        for start in range(0, linear.out_features, _ROWS_AT_A_TIME)
    ]
    planes = [torch.cat(plane) for plane in zip(*parts, strict=True)]
    starts, segments = _fill_segments(linear.outliers, linear.out_features)
    row_blocks = -(-linear.out_features // ROWS)
    return TiledLinear(
        qweight=planes[0],
        qweight_high=planes[1] if len(planes) > 1 else None,
        grid=_tile_grid(linear, row_blocks),
        segment_starts=starts,
        segments=segments,
        counters=linear.outliers.new_zeros(row_blocks, TOKEN_BLOCKS),
        bits=_code_bits(linear),
        in_features=linear.in_features,
        dtype=linear.scales.dtype,
    )


def block_columns(bits: int) -> int:
    """Columns of a block."""
    return WORD_BITS // PLANE_WIDTHS[bits][0] * BLOCK_WORDS


def _code_bits(linear: PackedLinear | ClusteredLinear) -> int:
    return 3 if isinstance(linear, ClusteredLinear) else linear.bits


def _padded_columns(linear: PackedLinear | ClusteredLinear) -> int:
    """Columns of whole blocks."""
    size = block_columns(_code_bits(linear))
    return -(-linear.in_features // size) * size


def _tile_rows(
    linear: PackedLinear | ClusteredLinear, start: int, stop: int
) -> list[Tensor]:
    """The planes of some rows in their new order."""
    bits, columns = _code_bits(linear), _padded_columns(linear)
    if isinstance(linear, ClusteredLinear):
        codes = (linear.steps(start, stop) - WIDE[0]).to(torch.uint8)
    else:
        planes = tuple(plane[start:stop] for plane in linear.weight_planes)
        codes = unpack_codes(planes, bits, linear.in_features)
    codes = pad(codes, (0, columns - linear.in_features))
    tiled, shift = [], 0
    for width in PLANE_WIDTHS[bits]:
        fields = WORD_BITS // width // 2
        words = block_columns(bits) // (2 * fields)
        plane = codes >> shift & (1 << width) - 1
        blocks = plane.view(stop - start, -1, fields, words, 2)
        dealt = blocks.permute(0, 1, 3, 4, 2).reshape(stop - start, columns)
        tiled.append(pack_plane(dealt, width))
        shift += width
    return tiled


def _tile_grid(linear: PackedLinear | ClusteredLinear, row_blocks: int) -> Tensor:
    """Scales and zero-points, with those of rows and groups that only blocks have."""
    groups = linear.scales.shape[1]
    padded = _padded_columns(linear) // linear.group_size if groups > 1 else 1
    scales = linear.scales.view(torch.int16).to(torch.int32)
    if isinstance(linear, ClusteredLinear):
        zeros = torch.full_like(scales, -WIDE[0])
    else:
        zeros = linear.zeros
    zeros = zeros.to(torch.bfloat16).view(torch.int16).to(torch.int32)
    words = pad(
        scales << 16 | zeros,
        (0, padded - groups, 0, row_blocks * ROWS - linear.out_features),
    )
    return words.view(row_blocks, ROWS, padded).transpose(1, 2).contiguous()


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
