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
from torch.nn.functional import pad

from tacq_vllm.format.clustered import ClusteredLinear
from tacq_vllm.format.clusters import WIDE
from tacq_vllm.format.linear import PackedLinear
from tacq_vllm.format.outliers import Outliers, encode_outliers, outliers_of_rows
from tacq_vllm.format.packing import (
    PLANE_WIDTHS,
    WORD_BITS,
    pack_codes,
    pack_plane,
    unpack_codes,
    unpack_plane,
)

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
    row_blocks = -(-linear.out_features // ROWS)
    starts, columns, segments = _fill_segments(linear, row_blocks)
    job_starts, job_blocks = _share_out(starts)
    return TiledLinear(
        qweight=planes[0],
        qweight_high=planes[1] if len(planes) > 1 else None,
        grid=_tile_grid(linear, row_blocks),
        segment_starts=starts,
        segment_columns=columns,
        segments=segments,
        job_starts=job_starts,
        job_blocks=job_blocks,
        counters=starts.new_zeros(row_blocks, TOKEN_BLOCKS),
        bits=_code_bits(linear),
        dtype=linear.scales.dtype,
        in_features=linear.in_features,
    )


def untile(tiled: TiledLinear) -> PackedLinear:
    """Invert `tile`; of clusters it gives the codes of 3 bits that they became."""
    parts = [
        _untile_rows(tiled, start, min(start + _ROWS_AT_A_TIME, tiled.out_features))
        for start in range(0, tiled.out_features, _ROWS_AT_A_TIME)
    ]
    planes = [torch.cat(plane) for plane in zip(*parts, strict=True)]
    size = tiled.group_size
    groups = tiled.in_features // size if size else 1
    words = tiled.grid.transpose(1, 2).reshape(-1, tiled.grid.shape[1])
    words = words[: tiled.out_features, :groups]
    zeros = pack_codes(words & (1 << tiled.bits) - 1, tiled.bits, dim=0)
    return PackedLinear(
        qweight=planes[0],
        qweight_high=planes[1] if len(planes) > 1 else None,
        scales=(words >> 16).to(torch.int16).view(tiled.dtype).contiguous(),
        qzeros=zeros[0],
        qzeros_high=zeros[1] if len(zeros) > 1 else None,
        outliers=encode_outliers(_collect_kept(tiled)),
        bits=tiled.bits,
        in_features=tiled.in_features,
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


def _untile_rows(tiled: TiledLinear, start: int, stop: int) -> tuple[Tensor, ...]:
    """The planes of some rows as they are stored."""
    columns = tiled.blocks * block_columns(tiled.bits)
    codes = tiled.qweight.new_zeros(stop - start, tiled.in_features, dtype=torch.uint8)
    shift = 0
    for plane, width in zip(tiled.planes, PLANE_WIDTHS[tiled.bits], strict=True):
        fields = WORD_BITS // width // 2
        words = block_columns(tiled.bits) // (2 * fields)
        dealt = unpack_plane(plane[start:stop], width, columns)
        blocks = dealt.view(stop - start, -1, words, 2, fields)
        values = blocks.permute(0, 1, 4, 2, 3).reshape(stop - start, columns)
        codes |= values[:, : tiled.in_features] << shift
        shift += width
    return pack_codes(codes, tiled.bits)


def _tile_grid(linear: PackedLinear | ClusteredLinear, row_blocks: int) -> Tensor:
    """Scales and zero-points, with those of rows and groups that only blocks have."""
    groups = linear.scales.shape[1]
    padded = _padded_columns(linear) // linear.group_size if groups > 1 else 1
    scales = linear.scales.view(torch.int16).to(torch.int32)
    if isinstance(linear, ClusteredLinear):
        zeros = torch.full_like(scales, -WIDE[0])
    else:
        zeros = linear.zeros
    words = pad(
        scales << 16 | zeros.to(torch.int32),
        (0, padded - groups, 0, row_blocks * ROWS - linear.out_features),
    )
    return words.view(row_blocks, ROWS, padded).transpose(1, 2).contiguous()


def _fill_segments(
    linear: PackedLinear | ClusteredLinear, row_blocks: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Segments of the kept weights: where they start, their panels, their entries."""
    table = linear.outliers
    starts = table[: linear.out_features + 1].long()
    entries = table[linear.out_features + 1 :].long()
    rows = torch.arange(linear.out_features, device=table.device)
    rows = rows.repeat_interleave(starts.diff())
    columns = entries & 0xFFFF
    panels = -(-linear.in_features // PANEL)
    # One number that orders them by rows' block, panel, column and row.
    keys = (rows // ROWS * panels + columns // PANEL) * (PANEL * ROWS)
    keys, order = (keys + columns % PANEL * ROWS + rows % ROWS).sort()
    owners = keys // (PANEL * ROWS)
    counts = owners.bincount(minlength=row_blocks * panels)
    needed = (counts + SEGMENT - 1) // SEGMENT
    ends = needed.cumsum(0)
    firsts = (ends - needed) * SEGMENT - (counts.cumsum(0) - counts)
    places = torch.arange(len(owners), device=table.device) + firsts[owners]
    words = (entries[order] >> 16 << 16) | keys % (PANEL * ROWS)
    segments = table.new_zeros(int(ends[-1]), SEGMENT)
    segments.view(-1)[places] = words.to(torch.int32)
    first_columns = torch.arange(panels, device=table.device) * PANEL
    first_columns = first_columns.repeat(row_blocks).repeat_interleave(needed)
    block_starts = torch.cat((ends.new_zeros(1), ends[panels - 1 :: panels]))
    return block_starts.to(torch.int32), first_columns.to(torch.int32), segments


def _collect_kept(tiled: TiledLinear) -> Outliers:
    """The kept weights of all segments, row by row."""
    words = tiled.segments
    blocks = torch.arange(tiled.grid.shape[0], device=words.device)
    blocks = blocks.repeat_interleave(tiled.segment_starts.diff())[:, None]
    # What is left over is at a segment's end. A value of 0 in the first row and column
    # looks like it, but is at a segment's beginning.
    is_kept = words != 0
    is_kept[:, 0] = True
    rows = (blocks * ROWS + (words & 0xF))[is_kept]
    columns = (tiled.segment_columns[:, None] + ((words & 0xFFFF) >> 4))[is_kept]
    order = (rows * tiled.in_features + columns).argsort()
    values = (words[is_kept] >> 16).to(torch.int16).view(tiled.dtype)
    return outliers_of_rows(
        rows[order], columns[order], values[order], tiled.out_features
    )


def _share_out(starts: Tensor) -> tuple[Tensor, Tensor]:
    """Jobs of what blocks of rows have over: where they start, whose they are."""
    over = (starts.diff() - OWN_SEGMENTS).clamp(min=0)
    jobs = (over + JOB_SEGMENTS - 1) // JOB_SEGMENTS
    ends = jobs.cumsum(0)
    blocks = torch.arange(len(jobs), device=starts.device).repeat_interleave(jobs)
    job_starts = torch.cat((ends.new_zeros(1), ends))
    return job_starts.to(torch.int32), blocks.to(torch.int32)
