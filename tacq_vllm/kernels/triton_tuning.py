"""Sizes of the Triton kernels' tiles, by class of GPU.

They are fixed: nothing is tried out while a server starts or captures CUDA graphs. For
tiled weights they are the best of some that were tried on an H100, for others what
arithmetic and the compiled code suggest for data-center GPUs of compute capability 8.0
and later.
"""

import functools
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tile:
    """What one program works on, and with how many threads."""

    rows: int
    """Rows of the weight."""
    columns: int
    """Columns of the weight in one step."""
    warps: int
    stages: int
    entries: int = 32
    """Kept weights in one step."""


@dataclass(frozen=True)
class DequantizeTile:
    """Rows of a tiled weight that one program writes, and with how many threads."""

    rows: int
    warps: int
    segments: int
    """Segments of kept weights in one step."""
    sharers: int
    """Programs that share the kept weights of some rows."""


@dataclass(frozen=True)
class TileGemm:
    """How the work of multiplying some tokens with a tiled weight is cut up."""

    tokens: int
    """At most; a multiple of 8."""
    warps: int
    """Programs, of one, that a multiprocessor has place for: columns are split where
    there would be fewer."""
    registers: int
    """Of a thread, at most."""


@dataclass(frozen=True)
class GemmTile(Tile):
    """A tile of the product with several tokens."""

    tokens: int = 16

    def serves(self, count: int) -> bool:
        """Whether so many tokens are one tile; the last of the table serves all."""
        return count <= self.tokens


@dataclass(frozen=True)
class Tuning:
    """The tiles of every kernel."""

    gemv: Tile
    gemm: tuple[GemmTile, ...]
    """By tokens, ascending."""
    dequantize: Tile
    clusters_gemv: Tile
    clusters_dequantize: Tile
    gemm_tokens: int
    """Tokens up to which dequantizing into a workspace does not pay."""
    programs: int
    """Programs that fill the GPU: columns are split where there would be fewer."""
    tile_gemm: tuple[TileGemm, ...]
    """By tokens, ascending."""
    tile_dequantize: DequantizeTile


_DEFAULT = Tuning(
    gemv=Tile(rows=16, columns=2048, warps=4, stages=2),
    gemm=(
        GemmTile(rows=64, columns=128, warps=4, stages=3, tokens=16),
        GemmTile(rows=64, columns=128, warps=4, stages=3, tokens=32),
        GemmTile(rows=64, columns=128, warps=4, stages=3, tokens=64),
        GemmTile(rows=128, columns=128, warps=8, stages=3, tokens=128),
    ),
    dequantize=Tile(rows=4, columns=1024, warps=4, stages=2),
    clusters_gemv=Tile(rows=16, columns=1536, warps=4, stages=2),
    clusters_dequantize=Tile(rows=4, columns=768, warps=4, stages=2),
    gemm_tokens=128,
    programs=256,
    tile_gemm=(
        TileGemm(tokens=8, warps=16, registers=128),
        TileGemm(tokens=16, warps=16, registers=128),
    ),
    tile_dequantize=DequantizeTile(rows=64, warps=4, segments=32, sharers=4),
)

_TABLES: dict[str, Tuning] = {}


def tuning_for(gpu_class: str) -> Tuning:
    """The table of a class of GPU, such as `sm90`."""
    return _TABLES.get(gpu_class, _DEFAULT)


@functools.cache
def gpu_class(device: torch.device) -> str:
    """The architecture that tuning tables are named by, such as `sm90`."""
    if device.type != "cuda":
        return "none"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm{major}{minor}"
