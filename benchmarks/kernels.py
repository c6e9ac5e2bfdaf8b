"""Time the quantized linear beside PyTorch's 16-bit one.

    python benchmarks/kernels.py [--threads N] [--shapes smollm2,llama3-8b] [--m 1,8]

Copies of each weight rotate, so that no cache flatters anyone, and the kept weights sit
as a real TaCQ mask has them: half of the rows empty, a few rows with hundreds. Writes
benchmarks/results/latest.json and prints a Markdown table.
"""

import argparse
import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import linear

from tacq_vllm.format.linear import PackedLinear, pack_linear
from tacq_vllm.format.outliers import select_outliers
from tacq_vllm.kernels.ops import prepare, quantized_linear
from tacq_vllm.kernels.reference import dequantize

RESULTS = Path(__file__).parent / "results" / "latest.json"
SHAPES = {
    "smollm2": [(576, 576), (1536, 576), (576, 1536)],
    "qwen2.5-0.5b": [(896, 896), (4864, 896), (896, 4864)],
    "llama3-8b": [(4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)],
}
OUTLIER_RATIO = 0.0035
ROTATED_BYTES = 128 << 20
MIN_SECONDS = 0.3


def main() -> None:
    """Run the matrix and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--m", default="1,8,16,64,256")
    parser.add_argument("--bits", default="2,3,4")
    parser.add_argument("--group-sizes", default="64,-1")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)

    bandwidth = read_bandwidth()
    rows = []
    for family in arguments.shapes.split(","):
        for n, k in SHAPES[family]:
            for m in map(int, arguments.m.split(",")):
                rows += run_shape(
                    m,
                    n,
                    k,
                    [int(bits) for bits in arguments.bits.split(",")],
                    [int(size) for size in arguments.group_sizes.split(",")],
                    bandwidth,
                )
    device = f"{cpu_name()}, {arguments.threads} threads"
    rows = [{"device": device, **row} for row in rows]
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
    print_table(device, bandwidth, rows)


def run_shape(
    m: int, n: int, k: int, bits: list[int], group_sizes: list[int], bandwidth: float
) -> Iterator[dict[str, object]]:
    """Time one product [m, k] x [k, n] in every format."""
    x = torch.randn(m, k, dtype=torch.bfloat16)
    count = max(2, ROTATED_BYTES // (2 * n * k))
    weights = [torch.randn(n, k, dtype=torch.bfloat16) for _ in range(count)]
    baseline = math.inf
    kernels: list[tuple[str, Callable[[Tensor], Tensor]]] = [
        ("torch_linear_bf16", lambda weight: linear(x, weight))
    ]
    if m == 1:
        kernels.append(("torch_mv_bf16", lambda weight: torch.mv(weight, x[0])))
    for name, kernel in kernels:
        seconds = time_rotating(kernel, weights)
        baseline = min(baseline, seconds)
        yield row(name, 16, 0, (m, n, k), seconds, seconds, 2 * n * k, bandwidth, 0.0)
    del weights
    for width in bits:
        for group_size in group_sizes:
            packed = random_packed(width, n, k, group_size)
            prepare(packed, x.dtype)
            nbytes = sum(t.nbytes for t in packed.tensors().values())
            copies = [clone(packed) for _ in range(max(2, ROTATED_BYTES // nbytes))]
            seconds = time_rotating(lambda p: quantized_linear(x, p, None), copies)
            exact = x.double() @ dequantize(packed).double().T
            error = quantized_linear(x, packed, None).double() - exact
            yield row(
                "tacq_linear",
                width,
                group_size,
                (m, n, k),
                seconds,
                baseline,
                nbytes,
                bandwidth,
                float(error.norm() / exact.norm()),
            )


def row(
    kernel: str,
    bits: int,
    group_size: int,
    shape: tuple[int, int, int],
    seconds: float,
    baseline: float,
    nbytes: int,
    bandwidth: float,
    error: float,
) -> dict[str, object]:
    """One result."""
    m, n, k = shape
    return {
        "kernel": kernel,
        "bits": bits,
        "group_size": group_size,
        "m": m,
        "n": n,
        "k": k,
        "us": round(seconds * 1e6, 1),
        "ratio_to_16bit": round(baseline / seconds, 2),
        "bandwidth_share": round(nbytes / seconds / bandwidth, 3),
        "rel_error": float(f"{error:.1e}"),
    }


def time_rotating(run: Callable[..., Tensor], weights: list[object]) -> float:
    """Median seconds of a call, each on another copy of the weight."""
    run(weights[0])
    seconds: list[float] = []
    while sum(seconds) < MIN_SECONDS or len(seconds) < 7:
        start = time.perf_counter()
        run(weights[len(seconds) % len(weights)])
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def read_bandwidth() -> float:
    """Bytes per second of reading a large tensor."""
    tensor = torch.ones(64 << 20)
    return tensor.nbytes / time_rotating(lambda t: t.sum(), [tensor])


def random_packed(bits: int, n: int, k: int, group_size: int) -> PackedLinear:
    """A random weight whose kept weights cluster in rows, as TaCQ's do."""
    groups = 1 if group_size == -1 else k // group_size
    zeros = torch.randint(0, 2**bits, (n, groups))
    codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8)
    fullness = torch.randn(n, 1).mul(1.5).exp() * (torch.rand(n, 1) < 0.5)
    density = fullness / fullness.mean() * OUTLIER_RATIO
    mask = torch.rand(n, k) < density
    codes[mask] = zeros.repeat_interleave(k // groups, 1)[mask].to(torch.uint8)
    scales = (torch.rand(n, groups) * 0.05 + 0.01).bfloat16()
    return pack_linear(
        codes, zeros, scales, select_outliers(torch.randn(n, k).bfloat16(), mask), bits
    )


def clone(packed: PackedLinear) -> PackedLinear:
    """The same weight elsewhere in memory."""
    tensors = {name: tensor.clone() for name, tensor in packed.tensors().items()}
    return PackedLinear.from_tensors(tensors, packed.bits, packed.in_features)


def cpu_name() -> str:
    """Model name of the processor."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def print_table(device: str, bandwidth: float, rows: list[dict[str, object]]) -> None:
    """Print the results as Markdown."""
    print(f"{device}; reads {bandwidth / 1e9:.1f} GB/s; torch {torch.__version__}\n")
    columns = ["kernel", "bits", "group_size", "m", "n", "k", "us"]
    columns += ["ratio_to_16bit", "bandwidth_share", "rel_error"]
    print("| " + " | ".join(columns) + " |")
    print("|" + " --- |" * len(columns))
    for result in rows:
        print("| " + " | ".join(str(result[column]) for column in columns) + " |")


if __name__ == "__main__":
    main()
