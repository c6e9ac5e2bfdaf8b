"""From the order that a weight is stored in to that of `tiles`, and back."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from tacq_vllm.format.clustered import ClusteredLinear
from tacq_vllm.format.clusters import WIDE
from tacq_vllm.format.linear import PackedLinear
from tacq_vllm.format.outliers import Outliers, encode_outliers, outliers_of_rows
from tacq_vllm.format.packing import pack_codes, unpack_codes
from tacq_vllm.kernels.tiles import (
    JOB_SEGMENTS,
    OWN_SEGMENTS,
    PANEL,
    PART_WORDS,
    ROWS,
    SEGMENT,
    STRIP,
    TOKEN_BLOCKS,
    TiledLinear,
    block_columns,
    block_words,
    field_of_strip,
    part_of_strip,
)

_SMALLEST_GROUP = STRIP
_LARGEST_PADDING = 1.25
"""Columns with what fills the last block, by those of the weight."""
_ROWS_AT_A_TIME = 1024


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
    row_blocks = -(-linear.out_features // ROWS)
    starts, columns, segments = _fill_segments(linear, row_blocks)
    job_starts, job_blocks = _share_out(starts)
    return TiledLinear(
        qweight=torch.cat(parts),
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
    words = tiled.grid.permute(0, 3, 2, 1).reshape(-1, tiled.grid.shape[1])
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


def _code_bits(linear: PackedLinear | ClusteredLinear) -> int:
    return 3 if isinstance(linear, ClusteredLinear) else linear.bits


def _padded_columns(linear: PackedLinear | ClusteredLinear) -> int:
    """Columns of whole blocks."""
    size = block_columns(_code_bits(linear))
    return -(-linear.in_features // size) * size


def _tile_rows(linear: PackedLinear | ClusteredLinear, start: int, stop: int) -> Tensor:
    """The words of some rows in their new order."""
    bits, columns = _code_bits(linear), _padded_columns(linear)
    if isinstance(linear, ClusteredLinear):
        codes = (linear.steps(start, stop) - WIDE[0]).to(torch.uint8)
    else:
        planes = tuple(plane[start:stop] for plane in linear.weight_planes)
        codes = unpack_codes(planes, bits, linear.in_features)
    codes = pad(codes, (0, columns - linear.in_features)).to(torch.int32)
    blocks = codes.view(stop - start, -1, block_columns(bits) // STRIP, PART_WORDS, 2)
    halves = blocks.new_zeros(
        *blocks.shape[:2], block_words(bits) // PART_WORDS, PART_WORDS, 2
    )
    for strip, values in enumerate(blocks.unbind(2)):
        for part, mask, shift, place in _bits_of_strip(strip, bits):
            halves[:, :, part] |= (values >> shift & mask) << place
    return (halves[..., 0] | halves[..., 1] << 16).flatten(1)


def _untile_rows(tiled: TiledLinear, start: int, stop: int) -> tuple[Tensor, ...]:
    """The planes of some rows as they are stored."""
    bits = tiled.bits
    words = tiled.qweight[start:stop].view(stop - start, tiled.blocks, -1, PART_WORDS)
    halves = torch.stack((words, words >> 16), dim=-1)
    strips = []
    for strip in range(block_columns(bits) // STRIP):
        values = torch.zeros_like(halves[:, :, 0])
        for part, mask, shift, place in _bits_of_strip(strip, bits):
            values |= (halves[:, :, part] >> place & mask) << shift
        strips.append(values.flatten(2))
    codes = torch.cat(strips, dim=2).flatten(1)[:, : tiled.in_features]
    return pack_codes(codes, bits)


def _bits_of_strip(strip: int, bits: int) -> list[tuple[int, int, int, int]]:
    """Where a strip's codes are.

    Returns:
        (part, mask, shift, place): `code >> shift & mask` is at `place` in the halves
        of words of the part.
    """
    place = field_of_strip(strip, bits) * bits
    if place + bits <= 16:
        return [(part_of_strip(strip, bits), (1 << bits) - 1, 0, place)]
    return [(part, 1, part, place) for part in range(3)]


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
    words = words.view(row_blocks, 2, ROWS // 2, padded)
    return words.permute(0, 3, 2, 1).contiguous()


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
    words = (entries[order] >> 16 << 16) | keys % ROWS * PANEL | keys // ROWS % PANEL
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
    rows = (blocks * ROWS + words // PANEL % ROWS)[is_kept]
    columns = (tiled.segment_columns[:, None] + words % PANEL)[is_kept]
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
