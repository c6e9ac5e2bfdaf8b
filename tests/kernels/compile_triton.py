"""Compile the Triton kernels for a GPU that need not be there.

    python tests/kernels/compile_triton.py 90 2,3,4
    python tests/kernels/compile_triton.py 89 3 --largest

The largest of a kernel's tiles is the one that takes the most shared memory; for x in
float32 it takes more.
"""

import argparse
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tacq_vllm.kernels.tiles import (
    JOB_SEGMENTS,
    OWN_SEGMENTS,
    ROWS,
    SEGMENT,
    TOKEN_BLOCKS,
)
from tacq_vllm.kernels.triton_cluster_codes import HALF
from tacq_vllm.kernels.triton_cluster_dequantize import cluster_dequantize_kernel
from tacq_vllm.kernels.triton_cluster_gemv import cluster_gemv_kernel
from tacq_vllm.kernels.triton_clusters import MAX_GEMV_TOKENS
from tacq_vllm.kernels.triton_dequantize import dequantize_kernel
from tacq_vllm.kernels.triton_gemm import gemm_kernel
from tacq_vllm.kernels.triton_gemv import gemv_kernel
from tacq_vllm.kernels.triton_tile_batch import tile_batch_kernel, transpose_kernel
from tacq_vllm.kernels.triton_tile_dequantize import (
    add_kept_kernel,
    tile_dequantize_kernel,
)
from tacq_vllm.kernels.triton_tile_gemm import tile_gemm_kernel
from tacq_vllm.kernels.triton_tiles import BATCH_STEP, TRANSPOSE_COLUMNS, operand_width
from tacq_vllm.kernels.triton_tuning import Tile, Tuning, tuning_for

WORDS = "*i32"
SHARED_BYTES = {
    80: 163 << 10,
    89: 99 << 10,
    90: 227 << 10,
    100: 227 << 10,
    120: 99 << 10,
}
"""Shared memory that a program may have, by compute capability."""
EXCHANGES = {
    tile_gemm_kernel: (("shfl.sync", "st.shared", "stmatrix"), 56),
    tile_batch_kernel: (("shfl.sync",), 0),
}
"""How threads give each other numbers, and how often they do at most: around the loops,
in which each product would take some. Those of a batch share x, and no more."""


def plane_kernels(
    tuning: Tuning, bits: int, x: str
) -> Iterator[tuple[Any, Tile, dict[str, Any]]]:
    """Kernels of planes, groups of 64: their tiles, and what is constant in them."""
    per_word = 8 if bits == 4 else 16
    shared = {"GROUP_WORDS": 64 // per_word, "BITS": bits}
    if bits != 3:
        shared |= {"qweight_high_ptr": None, "qzeros_high_ptr": None}

    def constants(tile: Tile, **own: Any) -> dict[str, Any]:
        return shared | {"WORDS": tile.columns // per_word} | own

    sizes = constants(tuning.gemv, EXACT=x == "*fp32", HAS_BIAS=True)
    yield gemv_kernel, tuning.gemv, sizes
    precision = "ieee" if x == "*fp32" else "tf32"
    for tile in tuning.gemm:
        sizes = constants(tile, TOKENS=tile.tokens, PRECISION=precision, HAS_BIAS=True)
        yield gemm_kernel, tile, sizes
    yield dequantize_kernel, tuning.dequantize, constants(tuning.dequantize)


def cluster_kernels(tuning: Tuning) -> Iterator[tuple[Any, Tile, dict[str, Any]]]:
    """The same of the kernels of clusters."""
    tile = tuning.clusters_gemv
    for tokens in (1, MAX_GEMV_TOKENS):
        sizes = {"HALVES": tile.columns // HALF, "TOKENS": tokens, "HAS_BIAS": True}
        yield cluster_gemv_kernel, tile, sizes
    tile = tuning.clusters_dequantize
    yield cluster_dequantize_kernel, tile, {"HALVES": tile.columns // HALF}


def tile_kernels(
    tuning: Tuning, bits: int, capability: int
) -> Iterator[tuple[Any, Any, dict[str, Any]]]:
    """The same of the kernels of tiled weights, with a last block that is not full."""
    sizes: dict[str, Any] = {"GROUP_SIZE": 64, "BITS": bits, "IS_PADDED": True}
    sizes |= {"GRID_ROWS": ROWS, "SEGMENT": SEGMENT, "DTYPE": tl.bfloat16}
    own: dict[str, Any] = {"HAS_BIAS": True, "COUNTERS": TOKEN_BLOCKS}
    own |= {"BLOCK_ROWS": ROWS, "STEP": BATCH_STEP}
    own |= {"OWN_SEGMENTS": OWN_SEGMENTS, "JOB_SEGMENTS": JOB_SEGMENTS}
    tiles = [(tile_gemm_kernel, 1, shape) for shape in tuning.tiled_gemm]
    tiles += [(tile_batch_kernel, shape.warps, shape) for shape in tuning.tiled_batch]
    for kernel, warps, shape in tiles:
        own |= {"ROWS": ROWS, "TOKENS": shape.tokens, "WARPS": warps}
        own |= {"WIDTH": operand_width(capability // 10, warps)}
        yield kernel, shape, sizes | own | {"IS_SPLIT": True}
        if bits == 3:
            yield kernel, shape, sizes | own | {"IS_SPLIT": False, "sums_ptr": None}
    for shape in tuning.tiled_batch:
        own = {"TOKENS": shape.tokens, "COLUMNS": TRANSPOSE_COLUMNS}
        yield transpose_kernel, shape, own
    yield tile_dequantize_kernel, tuning.tiled_dequantize, sizes
    yield add_kept_kernel, tuning.tiled_dequantize, sizes


def compile_kernel(
    kernel: Any, tile: Any, constants: dict[str, Any], x: str, target: Any
) -> None:
    """Compile one kernel for x of a type."""
    constants = {"ROWS": getattr(tile, "rows", None)} | constants
    if "ENTRIES" in kernel.arg_names:
        constants |= {"ENTRIES": tile.entries}
    else:
        constants |= {"SEGMENTS": getattr(tile, "segments", None)}
    is_early = kernel is tile_gemm_kernel and target.arch >= 90
    constants |= {"IS_EARLY": is_early}
    constants = {n: value for n, value in constants.items() if n in kernel.arg_names}
    pointers = dict.fromkeys(("x_ptr", "bias_ptr", "out_ptr"), x)
    pointers |= {"scales_ptr": "*bf16", "sums_ptr": "*fp32"}
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        else:
            signature[name] = pointers.get(
                name, WORDS if name.endswith("_ptr") else "i32"
            )
    # What a launch finds of large weights: addresses and sizes are multiples of 16.
    sixteen = [["tt.divisibility", 16]]
    attributes = {
        (number,): sixteen
        for number, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*") or name.endswith("_features")
    }
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    options = tile.options | {"launch_pdl": is_early}
    compiled = triton.compile(source, target=target, options=options)
    assert compiled.metadata.shared <= SHARED_BYTES[target.arch], (
        f"{kernel.__name__} {tile}: {compiled.metadata.shared} bytes shared"
    )
    if kernel in EXCHANGES:
        instructions, most = EXCHANGES[kernel]
        count = sum(compiled.asm["ptx"].count(name) for name in instructions)
        assert count <= most, f"{tile}: {count} exchanges between threads"
    print(kernel.__name__, x, constants, flush=True)


def main() -> None:
    """Compile for a compute capability, of planes those for some bits."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("capability", type=int)
    parser.add_argument("bits")
    parser.add_argument("--largest", action="store_true", help="of each kernel")
    given = parser.parse_args()
    target = GPUTarget("cuda", given.capability, 32)
    tuning = tuning_for(given.capability // 10)
    if given.largest:
        tuning = replace(
            tuning,
            gemm=tuning.gemm[-1:],
            tiled_gemm=tuning.tiled_gemm[-1:],
            tiled_batch=tuning.tiled_batch[-1:],
        )
    for bits in map(int, given.bits.split(",")):
        half = "*fp16" if bits == 4 else "*bf16"
        for x in (half, "*fp32") if given.largest else (half,):
            for kernel, tile, constants in plane_kernels(tuning, bits, x):
                compile_kernel(kernel, tile, constants, x, target)
        for kernel, tile, constants in tile_kernels(tuning, bits, given.capability):
            compile_kernel(kernel, tile, constants, half, target)
    for x in ("*fp32",) if given.largest else ("*bf16", "*fp32"):
        for kernel, tile, constants in cluster_kernels(tuning):
            compile_kernel(kernel, tile, constants, x, target)


if __name__ == "__main__":
    main()
