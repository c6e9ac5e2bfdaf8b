"""Pictures of a comparison; they need the extra `plots`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from tacq_vllm.compare.matrix import SALIENCIES
from tacq_vllm.compare.rows import Row
from tacq_vllm.compare.table import Group, Metric, group_rows, metric_name, metrics_of
from tacq_vllm.scores import LOWER_IS_BETTER

_DPI = 120


def draw_pictures(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Draw what the rows are enough for.

    Args:
        rows: of one comparison, the 16-bit model's among them.
        folder: gets the pictures.

    Returns:
        The files that were written.
    """
    groups, metrics = group_rows(rows), metrics_of(rows)
    cells = [group for group in groups if group.setting]
    losses = [metric for metric in metrics if metric[1] in LOWER_IS_BETTER]
    figures: dict[str, Figure] = {}
    if cells:
        figures["bits"] = _draw_bits(groups, metrics)
    if len({g.method for g in cells if g.method in SALIENCIES}) > 1 and losses:
        figures["saliency"] = _draw_saliency(cells, losses)
    if len({_calibration(group) for group in cells}) > 1:
        figures["recovery"] = _draw_recovery(cells, metrics)
    paths = []
    for name, figure in figures.items():
        paths.append(folder / f"{name}.png")
        figure.savefig(paths[-1], dpi=_DPI)
    return paths


def _draw_bits(groups: Sequence[Group], metrics: Sequence[Metric]) -> Figure:
    """Score against effective bits: a line a method, a part a metric."""
    figure, parts = _figure(len(metrics))
    cells = [group for group in groups if group.setting]
    several = len({_calibration(group) for group in cells}) > 1
    for axes, metric in zip(parts, metrics, strict=True):
        lines: dict[str, list[tuple[float, float]]] = {}
        for group in cells:
            value = group.value(metric)
            suffix = f", {_calibration(group)}" if several else ""
            if value is not None:
                point = (group.effective_bits, value)
                lines.setdefault(group.method + suffix, []).append(point)
        for name, points in lines.items():
            axes.plot(*zip(*sorted(points), strict=True), marker="o", label=name)
        for group in groups:
            value = group.value(metric)
            if not group.setting and value is not None:
                axes.axhline(value, color="black", linestyle=":", label="16-bit")
        if metric[1] == "perplexity":
            axes.set_yscale("log")
        axes.set(xlabel="effective bits", title=metric_name(metric))
    parts[-1].legend(fontsize="small")
    return figure


def _draw_saliency(cells: Sequence[Group], metrics: Sequence[Metric]) -> Figure:
    """Loss by what chooses the kept weights: a group of bars a setting."""
    figure, parts = _figure(len(metrics))
    chosen = [g for g in cells if g.method in (*SALIENCIES, "gptq")]
    settings = list(dict.fromkeys(group.setting[:-1] for group in chosen))
    methods = list(dict.fromkeys(group.method for group in chosen))
    width = 0.8 / len(methods)
    for axes, metric in zip(parts, metrics, strict=True):
        for number, method in enumerate(methods):
            values = {
                group.setting[:-1]: group.value(metric)
                for group in chosen
                if group.method == method
            }
            heights = [values.get(setting) or np.nan for setting in settings]
            places = np.arange(len(settings)) + number * width
            axes.bar(places, heights, width, label=method)
        middle = np.arange(len(settings)) + (len(methods) - 1) * width / 2
        labels = [_setting_name(*setting) for setting in settings]
        axes.set_xticks(middle, labels, rotation=30, ha="right")
        axes.set_title(metric_name(metric))
    parts[-1].legend(fontsize="small")
    return figure


def _draw_recovery(cells: Sequence[Group], metrics: Sequence[Metric]) -> Figure:
    """Recovery by task and calibration set: a part a method and its bits."""
    kinds = list(dict.fromkeys(_kind(group) for group in cells))
    sources = list(dict.fromkeys(_calibration(group) for group in cells))
    figure, parts = _figure(len(kinds))
    for axes, kind in zip(parts, kinds, strict=True):
        shares = np.full((len(sources), len(metrics)), np.nan)
        for group in cells:
            if _kind(group) == kind:
                row = sources.index(_calibration(group))
                for column, metric in enumerate(metrics):
                    recovery = group.recovery(metric)
                    shares[row, column] = np.nan if recovery is None else recovery
        axes.imshow(shares, aspect="auto", cmap="viridis", vmin=0, vmax=100)
        for (row, column), share in np.ndenumerate(shares):
            if np.isfinite(share):
                axes.text(column, row, f"{share:.0f} %", ha="center", color="white")
        names = [metric_name(metric) for metric in metrics]
        axes.set_xticks(range(len(metrics)), names, rotation=30, ha="right")
        axes.set_yticks(range(len(sources)), sources)
        axes.set(ylabel="calibrated on", title=kind)
    return figure


def _figure(parts: int) -> tuple[Figure, list[Any]]:
    figure = Figure(figsize=(5 * parts, 4.5), layout="constrained")
    return figure, list(np.atleast_1d(figure.subplots(1, parts)))


def _calibration(group: Group) -> str:
    return str(group.setting[2])


def _kind(group: Group) -> str:
    bits, size, _, options, method = group.setting
    return f"{method}, {_setting_name(bits, size, '', options)}"


def _setting_name(bits: int, size: int, source: str, options: str) -> str:
    parts = [f"{bits} bits", "rows" if size == -1 else f"groups of {size}"]
    return ", ".join([*parts, *filter(None, (source, options))])
