"""Sizes of the Triton kernels' tiles.

They are fixed: nothing is tried out while a server starts or captures CUDA graphs. For
tiled weights and up to 8 tokens, or very many, they are the best of some that were
tried on an H100, for others what arithmetic and the compiled code suggest for
data-center GPUs of compute capability 8.0 and later. None takes more than the 99 KB of
shared memory that other GPUs have.
"""

import functools
from dataclasses import dataclass, replace
from typing import Any

_ALWAYS = {"enable_fp_fusion": True}
"""Products and sums are fused, which Triton 3.10 leaves to whoever launches."""


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

    @property
    def options(self) -> dict[str, Any]:
        """What a kernel is launched with."""
        return _ALWAYS | {"num_warps": self.warps, "num_stages": self.stages}


@dataclass(frozen=True)
class TiledDequantize:
    """How a tiled weight is dequantized: by programs of some rows each."""

    rows: int
    warps: int
    segments: int
    """Segments of kept weights in one step."""
    sharers: int
    """Programs that share the kept weights of some rows."""

    @property
    def options(self) -> dict[str, Any]:
        """What a kernel is launched with."""
        return _ALWAYS | {"num_warps": self.warps}


@dataclass(frozen=True)
class TiledGemm:
    """How some tokens are multiplied with a tiled weight: by programs of one warp."""

    tokens: int
    """At most; a multiple of 8."""
    warps: int
    """Programs that a multiprocessor has place for: columns are split where there would
    be fewer."""
    registers: int
    """Of a thread, at most."""

    @property
    def options(self) -> dict[str, Any]:
        """What a kernel is launched with."""
        return _ALWAYS | {"num_warps": 1, "num_stages": 1, "maxnreg": self.registers}


@dataclass(frozen=True)
class TiledBatch:
    """How a batch of tokens is multiplied with a tiled weight: by larger programs."""

    tokens: int
    """At most."""
    warps: int
    """Of a program: as many blocks of rows."""
    programs: int
    """Programs that a multiprocessor has place for: columns are split where there would
    be fewer."""
    registers: int
    """Of a thread, at most."""

    @property
    def options(self) -> dict[str, Any]:
        """What a kernel is launched with."""
        return _ALWAYS | {
            "num_warps": self.warps,
            "num_stages": 1,
            "maxnreg": self.registers,
        }


@dataclass(frozen=True)
class GemmTile(Tile):
    """A tile of the product with several tokens."""

    tokens: int = 16
    """At most."""


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
    tiled_gemm: tuple[TiledGemm, ...]
    """By tokens, ascending."""
    tiled_batch: tuple[TiledBatch, ...]
    """By tokens, ascending."""
    tiled_dequantize: TiledDequantize


TUNING = Tuning(
    gemv=Tile(rows=16, columns=2048, warps=4, stages=2),
    gemm=(
        GemmTile(rows=64, columns=128, warps=4, stages=3, tokens=16),
        GemmTile(rows=64, columns=128, warps=4, stages=3, tokens=32),
        GemmTile(rows=64, columns=128, warps=4, stages=2, tokens=64),
        GemmTile(rows=128, columns=64, warps=8, stages=2, tokens=128),
    ),
    dequantize=Tile(rows=4, columns=1024, warps=4, stages=2),
    clusters_gemv=Tile(rows=16, columns=1536, warps=4, stages=2),
    clusters_dequantize=Tile(rows=4, columns=768, warps=4, stages=2),
    gemm_tokens=128,
    programs=256,
    tiled_gemm=(
        TiledGemm(tokens=8, warps=16, registers=128),
        TiledGemm(tokens=16, warps=12, registers=168),
    ),
    tiled_batch=(
        TiledBatch(tokens=64, warps=4, programs=3, registers=168),
        TiledBatch(tokens=128, warps=4, programs=2, registers=255),
    ),
    tiled_dequantize=TiledDequantize(rows=64, warps=4, segments=32, sharers=4),
)


@functools.cache
def tuning_for(major: int) -> Tuning:
    """The tiles for GPUs of a major compute capability."""
    # Tensor cores of 10 and 11 have a memory of their own; for them Triton 3.6 compiles
    # the largest batch to nothing.
    return replace(TUNING, tiled_batch=()) if major in (10, 11) else TUNING
