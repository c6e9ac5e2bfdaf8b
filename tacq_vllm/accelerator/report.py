"""The tables of the accelerator's README."""

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from tacq_vllm.accelerator.array import run_tile
from tacq_vllm.accelerator.costs import array_area, array_energy, element_area
from tacq_vllm.accelerator.design import (
    DESIGNS,
    MAC_3,
    MAC_8,
    TEMPORAL,
    ArraySize,
    Design,
)
from tacq_vllm.accelerator.layers import (
    Layer,
    LayerWork,
    gguf_layers,
    measure_layer,
    random_layer,
)

SIZE = ArraySize(rows=32, columns=32)

PAPER_AREA = "61.2 %"
PAPER_ENERGY = "1.79x"
"""Reductions that the abstract of arXiv 2504.19746 claims, the second "up to"."""

SMOLLM2 = {
    "blk.15.attn_q.weight": "SmolLM2-135M, q_proj, 576 x 576",
    "blk.15.ffn_up.weight": "SmolLM2-135M, up_proj, 1536 x 576",
    "blk.15.ffn_down.weight": "SmolLM2-135M, down_proj, 576 x 1536",
}
LLAMA = {
    "Llama-3-8B, q_proj, 4096 x 4096": (4096, 4096),
    "Llama-3-8B, up_proj, 14336 x 4096": (14336, 4096),
    "Llama-3-8B, down_proj, 4096 x 14336": (4096, 14336),
}


def area_table() -> str:
    """Areas of an element and of the array, by design."""
    temporal = array_area(TEMPORAL, SIZE)
    rows = []
    for design in DESIGNS:
        area = array_area(design, SIZE)
        saved = f"{1 - temporal / area:.1%}" if design != TEMPORAL else ""
        rows.append(
            (
                design.name,
                f"{element_area(design):.0f}",
                f"{area / 1e6:.3f}",
                saved.replace("%", " %"),
            )
        )
    rows.append(("paper", "", "", PAPER_AREA))
    header = (
        "array",
        "element, µm²",
        f"{SIZE.rows} x {SIZE.columns}, mm²",
        "the temporal one is smaller by",
    )
    return _table(header, rows)


def tile_table() -> str:
    """One tile of random codes, simulated: the same on every machine."""
    generator = np.random.default_rng(0)
    codes = generator.integers(-2, 2, (SIZE.rows, 96))
    activations = generator.integers(-127, 128, (96, SIZE.columns))
    rows = []
    for design in DESIGNS:
        run = run_tile(codes, activations, design)
        energy = array_energy(run.counts, run.toggles, design)
        rows.append(
            (
                design.name,
                f"{run.counts.cycles}",
                f"{run.counts.multiplications}",
                f"{run.counts.additions}",
                f"{run.toggles}",
                f"{energy / 1e3:.2f}",
            )
        )
    header = ("array", "cycles", "products", "additions", "toggles", "array, nJ")
    return _table(header, rows)


def layers(model: Path | None) -> Iterator[Layer]:
    """The layers of the tables; random weights of SmolLM2's shapes without a model."""
    if model is not None:
        yield from gguf_layers(model, SMOLLM2)
    else:
        for name in SMOLLM2.values():
            out_features, in_features = map(int, re.findall(r"(\d+) x (\d+)", name)[0])
            yield random_layer(
                f"{name} (random)", out_features, in_features, out_features
            )
    for name, (out_features, in_features) in LLAMA.items():
        yield random_layer(name, out_features, in_features, rows=2 * SIZE.rows)


def layer_tables(every: Iterable[Layer]) -> str:
    """What each design does for each layer, and how they compare."""
    work_rows, ratio_rows = [], []
    for layer in every:
        works = {design: measure_layer(layer, design, SIZE) for design in DESIGNS}
        for design, work in works.items():
            work_rows.append((layer.name, design.name, *_work_cells(work)))
        for design in (MAC_8, MAC_3):
            cells = _ratio_cells(works[TEMPORAL], works[design], design)
            ratio_rows.append((layer.name, design.name, *cells))
    ratio_rows.append(
        (f"paper: up to {PAPER_ENERGY}, of what we do not know", *[""] * 6)
    )
    work_header = (
        "layer",
        "array",
        "cycles, thousands",
        "products, millions",
        "additions, millions",
        "toggles, millions",
        "buffer, MB",
        "memory, MB",
        "array, µJ",
        "buffer, µJ",
        "memory, µJ",
    )
    ratio_header = (
        "layer",
        "the temporal array against",
        "cycles",
        "throughput per area",
        "energy efficiency, array alone",
        "with the buffer",
        "with the memory",
    )
    return _table(work_header, work_rows) + "\n\n" + _table(ratio_header, ratio_rows)


def replace_tables(page: str, tables: dict[str, str]) -> str:
    """Put tables between their marks in a page.

    Raises:
        ValueError: the page has no such marks.
    """
    for name, table in tables.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        before, found_begin, rest = page.partition(begin)
        _, found_end, after = rest.partition(end)
        if not (found_begin and found_end):
            raise ValueError(f"the page has no place for the table of {name}")
        page = f"{before}{begin}{table}\n{end}{after}"
    return page


def _work_cells(work: LayerWork) -> tuple[str, ...]:
    counts, traffic = work.counts, work.traffic
    return (
        f"{counts.cycles / 1e3:.1f}",
        f"{counts.multiplications / 1e6:.1f}",
        f"{counts.additions / 1e6:.1f}",
        f"{work.toggles / 1e6:.1f}",
        f"{traffic.buffer_bytes / 1e6:.2f}",
        f"{traffic.memory_bytes / 1e6:.2f}",
        f"{work.array_pj / 1e6:.2f}",
        f"{work.buffer_pj / 1e6:.2f}",
        f"{work.memory_pj / 1e6:.2f}",
    )


def _ratio_cells(
    temporal: LayerWork, other: LayerWork, design: Design
) -> tuple[str, ...]:
    temporal_area = array_area(TEMPORAL, SIZE) * temporal.counts.cycles
    other_area = array_area(design, SIZE) * other.counts.cycles

    def energies(work: LayerWork) -> tuple[float, float, float]:
        on_chip = work.array_pj + work.buffer_pj
        return work.array_pj, on_chip, on_chip + work.memory_pj

    ratios = zip(energies(other), energies(temporal), strict=True)
    return (
        f"{temporal.counts.cycles / other.counts.cycles:.2f}x",
        f"{other_area / temporal_area:.2f}x",
        *(f"{theirs / ours:.2f}x" for theirs, ours in ratios),
    )


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
