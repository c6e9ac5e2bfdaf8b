"""A picture of where the kept weights of a checkpoint sit."""

from pathlib import Path

import numpy as np

from tacq_vllm.format.inspection import Inspection, outlier_counts
from tacq_vllm.format.staging import staged_file


def plot_outliers(folder: Path, figures: Inspection, path: Path) -> None:
    """Draw the share of kept weights by linear, and how rows and columns share them.

    Args:
        folder: the checkpoint.
        figures: what `inspect_checkpoint` counted in it.
        path: the picture to write; its suffix picks the type.

    Raises:
        ModuleNotFoundError: matplotlib is not installed (extra `plots`).
    """
    from matplotlib.figure import Figure

    names = [linear.name for linear in figures.linears]
    kinds = list(dict.fromkeys(name.split(".")[-1] for name in names))
    blocks = list(dict.fromkeys(map(_block, names)))
    shares = np.full((len(blocks), len(kinds)), np.nan)
    rows: dict[str, list[np.ndarray]] = {kind: [] for kind in kinds}
    columns: dict[str, list[np.ndarray]] = {kind: [] for kind in kinds}
    for linear, kept in zip(figures.linears, outlier_counts(folder), strict=True):
        kind = linear.name.split(".")[-1]
        share = 100 * linear.outliers / linear.weights
        shares[blocks.index(_block(linear.name)), kinds.index(kind)] = share
        rows[kind].append(kept.per_row.numpy())
        columns[kind].append(kept.per_column.numpy())

    figure = Figure(figsize=(14, 5), layout="constrained")
    heat, by_row, by_column = figure.subplots(1, 3)
    image = heat.imshow(shares, aspect="auto", cmap="viridis")
    heat.set_xticks(range(len(kinds)), kinds, rotation=45, ha="right")
    heat.set(ylabel="decoder block", title="weights kept (%)")
    figure.colorbar(image, ax=heat)
    for axes, counts, what in ((by_row, rows, "row"), (by_column, columns, "column")):
        for kind in kinds:
            values = np.sort(np.concatenate(counts[kind]))[::-1]
            share_of_lines = np.linspace(0, 100, values.size)
            axes.plot(share_of_lines, values, label=kind)
        axes.set(xlabel=f"{what}s, fullest first (%)", yscale="symlog")
        axes.set_title(f"weights kept in a {what}")
    by_column.legend(fontsize="small")
    with staged_file(path) as staging:
        figure.savefig(staging, format=path.suffix[1:] or "png", dpi=120)


def _block(name: str) -> str:
    numbers = [part for part in name.split(".") if part.isdigit()]
    return numbers[0] if numbers else name
