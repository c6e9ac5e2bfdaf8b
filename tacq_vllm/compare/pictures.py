"""Pictures of a comparison; they need the extra `plots`."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from tacq_vllm.compare.matrix import SALIENCIES
from tacq_vllm.compare.rows import Row
from tacq_vllm.compare.table import Group, Metric, group_rows, metric_name, metrics_of
from tacq_vllm.format.staging import staged_file
from tacq_vllm.scores import LOWER_IS_BETTER

_DPI = 120
_COLUMNS = 4


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
    # Of a setting, more than one choice of kept weights; of a kind, of calibration.
    kept = [group for group in cells if group.method in SALIENCIES]
    chosen = _of_several(kept, _setting_name, lambda group: group.method)
    conditioned = _of_several(cells, _kind, _calibration)
    figures: dict[str, Figure] = {}
    if cells:
        figures["bits"] = _draw_bits(groups, metrics)
    if chosen and losses:
        plain = [group for group in cells if group.method == "gptq"]
        figures["saliency"] = _draw_saliency(plain + chosen, chosen, losses)
    if conditioned:
        figures["recovery"] = _draw_recovery(conditioned, metrics)
    paths = []
    for name, figure in figures.items():
        paths.append(folder / f"{name}.png")
        with staged_file(paths[-1]) as staging:
            figure.savefig(staging, format="png", dpi=_DPI)
    return paths


def _draw_bits(groups: Sequence[Group], metrics: Sequence[Metric]) -> Figure:
    """Score against effective bits: a line a method, a part a metric."""
    figure, parts = _figure(len(metrics))
    cells = [group for group in groups if group.setting]
    names = list(dict.fromkeys(map(_line_name, cells)))
    for axes, metric in zip(parts, metrics, strict=True):
        for number, name in enumerate(names):
            points = sorted(
                (group.effective_bits, value)
                for group in cells
                if _line_name(group) == name
                and (value := group.value(metric)) is not None
            )
            x, y = zip(*points, strict=True) if points else ((), ())
            axes.plot(x, y, marker="o", color=f"C{number}", label=name)
        for group in groups:
            value = group.value(metric)
            if not group.setting and value is not None:
                axes.axhline(value, color="black", linestyle=":", label="16-bit")
        if metric[1] == "perplexity":
            axes.set_yscale("log")
        axes.set(xlabel="effective bits", title=metric_name(metric))
    _add_legend(figure, parts[0])
    return figure


def _draw_saliency(
    groups: Sequence[Group], chosen: Sequence[Group], metrics: Sequence[Metric]
) -> Figure:
    """Loss by what chooses the kept weights: bars side by side for each setting."""
    figure, parts = _figure(len(metrics))
    settings = list(dict.fromkeys(map(_setting_name, chosen)))
    methods = list(dict.fromkeys(group.method for group in groups))
    width = 0.8 / len(methods)
    for axes, metric in zip(parts, metrics, strict=True):
        for number, method in enumerate(methods):
            values = {
                _setting_name(group): group.value(metric)
                for group in groups
                if group.method == method
            }
            heights = [values.get(setting) or np.nan for setting in settings]
            places = np.arange(len(settings)) + number * width
            axes.bar(places, heights, width, label=method)
        middle = np.arange(len(settings)) + (len(methods) - 1) * width / 2
        axes.set_xticks(middle, [name.replace(", ", "\n") for name in settings])
        axes.set_title(metric_name(metric))
    _add_legend(figure, parts[0])
    return figure


def _draw_recovery(cells: Sequence[Group], metrics: Sequence[Metric]) -> Figure:
    """Recovery by task and calibration set: a part a method and its bits."""
    kinds = list(dict.fromkeys(map(_kind, cells)))
    sources = list(dict.fromkeys(map(_calibration, cells)))
    figure, parts = _figure(len(kinds))
    for axes, kind in zip(parts, kinds, strict=True):
        shares = np.full((len(sources), len(metrics)), np.nan)
        for group in cells:
            if _kind(group) == kind:
                row = sources.index(_calibration(group))
                for column, metric in enumerate(metrics):
                    recovery = group.recovery(metric)
                    shares[row, column] = np.nan if recovery is None else recovery
        axes.imshow(shares, aspect="auto", cmap="Blues", vmin=0, vmax=150)
        for (row, column), share in np.ndenumerate(shares):
            if np.isfinite(share):
                axes.text(column, row, f"{share:.0f} %", ha="center")
        names = [metric_name(metric) for metric in metrics]
        axes.set_xticks(range(len(metrics)), names, rotation=20, ha="right")
        axes.set_yticks(range(len(sources)), sources)
        axes.set(ylabel="calibrated on", title=kind)
    return figure


def _of_several(
    groups: Sequence[Group],
    key: Callable[[Group], str],
    choice: Callable[[Group], str],
) -> list[Group]:
    """The groups with whose key there is more than one choice."""
    choices: dict[str, set[str]] = {}
    for group in groups:
        choices.setdefault(key(group), set()).add(choice(group))
    return [group for group in groups if len(choices[key(group)]) > 1]


def _figure(parts: int) -> tuple[Figure, list[Any]]:
    """An empty figure of parts, at most so many beside each other."""
    columns = min(parts, _COLUMNS)
    rows = -(-parts // columns)
    figure = Figure(figsize=(5 * columns + 1, 4 * rows), layout="constrained")
    axes = list(np.ravel(figure.subplots(rows, columns)))
    for unused in axes[parts:]:
        unused.set_axis_off()
    return figure, axes[:parts]


def _add_legend(figure: Figure, axes: Any) -> None:
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper")


def _calibration(group: Group) -> str:
    return str(group.setting[2])


def _line_name(group: Group) -> str:
    _, _, source, options, method = group.setting
    return ", ".join(filter(None, (method, source, options)))


def _kind(group: Group) -> str:
    bits, size, _, options, method = group.setting
    return ", ".join(filter(None, (method, _grid_name(bits, size), options)))


def _setting_name(group: Group) -> str:
    bits, size, source, options, _ = group.setting
    return ", ".join(filter(None, (_grid_name(bits, size), source, options)))


def _grid_name(bits: int, group_size: int) -> str:
    return f"{bits} bits, {'rows' if group_size == -1 else f'groups of {group_size}'}"
