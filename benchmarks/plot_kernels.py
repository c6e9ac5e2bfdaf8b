"""Draw how many times faster than 16 bits the kernels are, by the number of tokens.

    python benchmarks/plot_kernels.py [RESULTS.json] [PICTURE.svg]

Needs the extra `plots`.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "latest.json"
PICTURE = ROOT / "docs" / "kernels.svg"
SHAPES = [(4096, 14336), (576, 1536)]
STYLES = {"tacq_int8": "-", "tacq_exact": "--", "torch_int4": ":", "vllm_int4": "-."}


def main() -> None:
    """Read the results and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", nargs="?", type=Path, default=RESULTS)
    parser.add_argument("picture", nargs="?", type=Path, default=PICTURE)
    arguments = parser.parse_args()
    rows = json.loads(arguments.results.read_text())
    # As many threads as the first rows were measured with.
    rows = [row for row in rows if row["device"] == rows[0]["device"]]
    plt.rcParams["svg.hashsalt"] = "tacq"
    figure, axes = plt.subplots(1, len(SHAPES), figsize=(9, 3.6), sharey=True)
    for axis, (n, k) in zip(axes, SHAPES, strict=True):
        draw(axis, [row for row in rows if (row["n"], row["k"]) == (n, k)])
        axis.set_title(f"{n} x {k}")
    axes[0].set_ylabel("times faster than bfloat16")
    axes[0].legend(fontsize="small")
    figure.suptitle(rows[0]["device"], fontsize="small")
    figure.tight_layout()
    figure.savefig(arguments.picture, metadata={"Date": None})


def draw(axis: Any, rows: list[dict[str, Any]]) -> None:
    """A line for each kernel and number of bits, of groups of 64."""
    lines: dict[tuple[str, int], list[tuple[int, float]]] = {}
    for row in rows:
        if row["group_size"] == 64:
            line = lines.setdefault((row["kernel"], row["bits"]), [])
            line.append((row["m"], row["ratio_to_16bit"]))
    for (kernel, bits), points in lines.items():
        label = f"{kernel.replace('_', ' ')}, {bits} bits"
        color = f"C{bits - 2}"
        axis.plot(*zip(*points, strict=True), STYLES[kernel], color=color, label=label)
    axis.axhline(1, color="gray", linewidth=0.8)
    axis.set_xscale("log", base=2)
    axis.set_xlabel("tokens (m)")


if __name__ == "__main__":
    main()
