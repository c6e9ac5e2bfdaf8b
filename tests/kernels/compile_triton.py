"""Compile every Triton kernel for a GPU that need not be there.

python tests/kernels/compile_triton.py 90
"""

import sys
from collections.abc import Iterator
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tacq_vllm.kernels.triton_dequantize import dequantize_kernel
from tacq_vllm.kernels.triton_gemm import gemm_kernel
from tacq_vllm.kernels.triton_gemv import gemv_kernel
from tacq_vllm.kernels.triton_tuning import Tile, tuning_for

WORDS = "*i32"
SHARED_BYTES = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10}
"""Shared memory that a program may have, by compute capability."""


def kernels(capability: int, x: str) -> Iterator[tuple[Any, Tile, dict[str, Any]]]:
    """Kernels, their tiles, and what is constant in them."""
    tuning = tuning_for(f"sm{capability}")
    yield gemv_kernel, tuning.gemv, {"EXACT": x == "*fp32", "HAS_BIAS": True}
    for tile in tuning.gemm:
        precision = "ieee" if x == "*fp32" else "tf32"
        sizes = {"TOKENS": tile.tokens, "PRECISION": precision, "HAS_BIAS": True}
        yield gemm_kernel, tile, sizes
    yield dequantize_kernel, tuning.dequantize, {}


def compile_kernel(
    kernel: Any, tile: Tile, constants: dict[str, Any], bits: int, x: str, target: Any
) -> None:
    """Compile one kernel for groups of 64 columns."""
    per_word = 8 if bits == 4 else 16
    constants = constants | {
        "GROUP_WORDS": 64 // per_word,
        "BITS": bits,
        "ROWS": tile.rows,
        "WORDS": tile.columns // per_word,
        "ENTRIES": tile.entries,
    }
    if bits != 3:
        constants |= {"qweight_high_ptr": None, "qzeros_high_ptr": None}
    pointers = dict.fromkeys(("x_ptr", "bias_ptr", "out_ptr"), x)
    pointers |= {"scales_ptr": "*bf16"}
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        else:
            signature[name] = pointers.get(
                name, WORDS if name.endswith("_ptr") else "i32"
            )
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    compiled = triton.compile(source, target=target, options=options)
    assert compiled.metadata.shared <= SHARED_BYTES[target.arch], (
        f"{kernel.__name__} {tile}: {compiled.metadata.shared} bytes shared"
    )


def main() -> None:
    """Compile for the compute capability that is the argument."""
    capability = int(sys.argv[1])
    target = GPUTarget("cuda", capability, 32)
    for bits, x in ((2, "*bf16"), (3, "*bf16"), (4, "*fp16")):
        for kernel, tile, constants in kernels(capability, x):
            compile_kernel(kernel, tile, constants, bits, x, target)
            print(kernel.__name__, bits, x, tile, flush=True)


if __name__ == "__main__":
    main()
