"""Time the quantized linear beside 16-bit ones, and those of other packages.

    python benchmarks/linear_kernels.py [--threads N] [--shapes smollm2] [--m 1,8]

On a CPU all kernels of a shape take turns in short bursts, so that what else the
machine does hits them alike; on a GPU (`--device cuda`) a CUDA graph multiplies with
all copies of a weight. Copies rotate, so that no cache flatters anyone, and the kept
weights sit as a real TaCQ mask has them: half of the rows empty, a few rows with
hundreds. Writes a JSON list and prints a Markdown table.
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from gpu_peers import gpu_kernels
from machine import device_name
from peers import BURST, MANY, Kernel, copies, int4_kernels, sixteen_bit_kernels
from torch import Tensor

from tacq_vllm.format.clustered import ClusteredLinear
from tacq_vllm.format.clusters import clustered_words
from tacq_vllm.format.linear import PackedLinear, pack_linear
from tacq_vllm.format.outliers import Outliers, encode_outliers, select_outliers
from tacq_vllm.kernels.cpu_exact import MAX_FUSED_TOKENS
from tacq_vllm.kernels.ops import arrange, quantized_linear
from tacq_vllm.kernels.reference import dequantize

RESULTS = Path(__file__).parent / "results" / "latest.json"
SHAPES = {
    "smollm2": [(576, 576), (1536, 576), (576, 1536)],
    "qwen2.5-0.5b": [(896, 896), (4864, 896), (896, 4864)],
    "llama3-8b": [(4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)],
}
OUTLIER_RATIO = 0.0035


@torch.inference_mode()
def main() -> None:
    """Run the matrix and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--m", default="1,8,16,64,256,2048")
    parser.add_argument("--bits", default="2,3,4")
    parser.add_argument("--group-sizes", default="64,-1")
    parser.add_argument("--activations", default="int8,exact")
    parser.add_argument("--seconds", type=float, default=0.3, help="of each product")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)

    arguments.output.parent.mkdir(exist_ok=True)
    torch.set_default_device(arguments.device)
    on_gpu = arguments.device == "cuda"
    bandwidth = read_bandwidth()
    device = {"device": device_name(arguments.device, arguments.threads)}
    ways = ["triton"] if on_gpu else arguments.activations.split(",")
    rows: list[dict[str, Any]] = []
    for n, k in (nk for name in arguments.shapes.split(",") for nk in SHAPES[name]):
        kernels = [
            *sixteen_bit_kernels(n, k),
            *(
                kernel
                for size in map(int, arguments.group_sizes.split(","))
                for bits in map(int, arguments.bits.split(","))
                for kernel in own_kernels(
                    "tacq", bits, size, random_packed(bits, n, k, size), ways
                )
            ),
            *own_kernels("tacq_fineq", 2.33, -1, random_clustered(n, k), ways),
        ]
        kernels.extend((gpu_kernels if on_gpu else int4_kernels)(n, k, 64))
        for m in map(int, arguments.m.split(",")):
            x = torch.randn(m, k, dtype=torch.bfloat16)
            timed = time_kernels(kernels, x, arguments.seconds)
            rows.extend(device | row for row in describe(timed, x, bandwidth))
        # After every shape, so that a run that is cut off leaves what it has measured.
        arguments.output.write_text(json.dumps(rows, indent=1) + "\n")
    print(f"{device['device']}; reads {bandwidth / 1e9:.1f} GB/s;", end=" ")
    print(f"torch {torch.__version__}\n")
    print_table(rows)


def own_kernels(
    name: str,
    bits: float,
    group_size: int,
    packed: PackedLinear | ClusteredLinear,
    activations: list[str],
) -> Iterator[Kernel]:
    """Ours for a weight, one for each treatment of x."""
    stored = sum(tensor.nbytes for tensor in packed.tensors().values())
    weights = [arrange(clone(packed), torch.bfloat16) for _ in range(copies(stored))]
    nbytes = sum(tensor.nbytes for tensor in weights[0].tensors().values())
    dense = dequantize(packed).float()

    def multiply(x: Tensor, weight: Any) -> Tensor:
        return quantized_linear(x, weight, weight.layout, None)

    for chosen in activations:
        yield Kernel(
            f"{name}_{chosen}",
            bits,
            group_size,
            weights,
            multiply,
            dense,
            nbytes,
            chosen,
            # For more it is PyTorch's product in float32, and what makes its weights.
            MAX_FUSED_TOKENS if chosen == "exact" else MANY,
        )


def cpu_seconds(kernels: list[Kernel], x: Tensor, least: float) -> list[float]:
    """Median times of the products, the kernels taking turns."""
    seconds: list[list[float]] = [[] for _ in kernels]
    for kernel in kernels:
        with kernel.chosen():
            kernel.multiply(x, kernel.weights[0])
    turn, burst = 0, BURST if x.shape[0] <= 256 else 1
    while turn < 2 or min(map(sum, seconds)) < least:
        for kernel, times in zip(kernels, seconds, strict=True):
            with kernel.chosen():
                for number in range(turn * burst, (turn + 1) * burst):
                    weight = kernel.weights[number % len(kernel.weights)]
                    start = time.perf_counter()
                    kernel.multiply(x, weight)
                    times.append(time.perf_counter() - start)
        turn += 1
    return list(map(statistics.median, seconds))


def gpu_seconds(kernel: Kernel, x: Tensor, least: float) -> float:
    """Median time of a product in a CUDA graph that goes through all copies."""
    for weight in kernel.weights[:2]:
        kernel.multiply(x, weight)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for weight in kernel.weights:
            kernel.multiply(x, weight)
    times = []
    while len(times) < 5 or sum(times) < least:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / 1000)
    return statistics.median(times) / len(kernel.weights)


def time_kernels(
    kernels: list[Kernel], x: Tensor, least: float
) -> list[tuple[Kernel, float]]:
    """The kernels that are for so many tokens, and their seconds."""
    kernels = [kernel for kernel in kernels if x.shape[0] <= kernel.max_tokens]
    if x.is_cuda:
        medians = [gpu_seconds(kernel, x, least) for kernel in kernels]
    else:
        medians = cpu_seconds(kernels, x, least)
    return list(zip(kernels, medians, strict=True))


def describe(
    timed: list[tuple[Kernel, float]], x: Tensor, bandwidth: float
) -> Iterator[dict[str, Any]]:
    """The rows of the results, with the error beside float32."""
    baseline = min(median for kernel, median in timed if kernel.bits == 16)
    for kernel, median in timed:
        exact = x.float() @ kernel.dense.T
        with kernel.chosen():
            error = kernel.multiply(x, kernel.weights[0]).float() - exact
        yield {
            "kernel": kernel.name,
            "bits": kernel.bits,
            "group_size": kernel.group_size,
            "m": x.shape[0],
            "n": kernel.dense.shape[0],
            "k": kernel.dense.shape[1],
            "us": round(median * 1e6, 1),
            "ratio_to_16bit": round(baseline / median, 2),
            "bandwidth_share": round(kernel.nbytes / median / bandwidth, 3),
            "rel_error": float(f"{float(error.norm() / exact.norm()):.1e}"),
        }


def read_bandwidth() -> float:
    """Bytes per second of reading a large tensor."""
    tensor = torch.ones(64 << 20)
    seconds = []
    for _ in range(20):
        start = time.perf_counter()
        float(tensor.sum())
        seconds.append(time.perf_counter() - start)
    return tensor.nbytes / statistics.median(seconds)


def random_packed(bits: int, n: int, k: int, group_size: int) -> PackedLinear:
    """A random weight in planes."""
    groups = 1 if group_size == -1 else k // group_size
    zeros = torch.randint(0, 2**bits, (n, groups))
    codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8)
    scales = (torch.rand(n, groups) * 0.05 + 0.01).bfloat16()
    return pack_linear(codes, zeros, scales, random_outliers(n, k), bits)


def random_clustered(n: int, k: int) -> ClusteredLinear:
    """A random weight in FineQ's layout, with a scale per row."""
    words = torch.randint(-(2**31), 2**31, (n, clustered_words(k)), dtype=torch.int32)
    scales = (torch.rand(n, 1) * 0.05 + 0.01).bfloat16()
    return ClusteredLinear(words, scales, encode_outliers(random_outliers(n, k)), k)


def random_outliers(n: int, k: int) -> Outliers:
    """Kept weights that cluster in rows, as TaCQ's do."""
    fullness = torch.randn(n, 1).mul(1.5).exp() * (torch.rand(n, 1) < 0.5)
    density = fullness / fullness.mean() * OUTLIER_RATIO
    return select_outliers(torch.randn(n, k).bfloat16(), torch.rand(n, k) < density)


def clone(packed: PackedLinear | ClusteredLinear) -> PackedLinear | ClusteredLinear:
    """The same weight elsewhere in memory."""
    tensors = {name: tensor.clone() for name, tensor in packed.tensors().items()}
    return replace(packed, **tensors)


def print_table(rows: list[dict[str, Any]]) -> None:
    """Print the results as Markdown: a line for a shape, a column for a kernel."""
    lines: dict[tuple[int, int, int], dict[str, dict[str, Any]]] = {}
    for row in rows:
        group = "" if row["group_size"] in (0, 64) else " per row"
        name = f"{row['kernel']} {row['bits']}{group}"
        lines.setdefault((row["m"], row["n"], row["k"]), {})[name] = row
    columns = list(dict.fromkeys(name for line in lines.values() for name in line))
    print("| m | n x k | " + " | ".join(columns) + " |")
    print("|" + " --- |" * (len(columns) + 2))
    for (m, n, k), line in lines.items():
        cells = [
            f"{line[name]['us']:.0f} ({line[name]['ratio_to_16bit']:.2f}x)"
            if name in line
            else ""
            for name in columns
        ]
        print(f"| {m} | {n} x {k} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
