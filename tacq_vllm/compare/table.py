"""The rows of a comparison as a Markdown table, the seeds of a setting together."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from tacq_vllm.compare.rows import Row
from tacq_vllm.scores import Score

Metric = tuple[str, str]
"""A task and one of its metrics."""


@dataclass(frozen=True)
class Group:
    """The rows of one setting, or the 16-bit model's."""

    rows: tuple[Row, ...]

    @property
    def setting(self) -> tuple[Any, ...]:
        """What they have in common; empty for the 16-bit model."""
        cell = self.rows[0].cell
        return () if cell is None else cell.setting

    @property
    def method(self) -> str:
        """The method's name."""
        cell = self.rows[0].cell
        return "16-bit" if cell is None else cell.method

    @property
    def effective_bits(self) -> float:
        """Their mean: seeds keep the same number of weights, in other places."""
        return fmean(row.effective_bits for row in self.rows)

    def scores(self, metric: Metric) -> list[Score]:
        """One of each row that has it."""
        found = (row.score(*metric) for row in self.rows)
        return [score for score in found if score is not None]

    def value(self, metric: Metric) -> float | None:
        """The mean over the seeds; None if it was not measured."""
        scores = self.scores(metric)
        return fmean(score.value for score in scores) if scores else None

    def recovery(self, metric: Metric) -> float | None:
        """The mean over the seeds; None if it is not known."""
        known = [s.recovery for s in self.scores(metric) if s.recovery is not None]
        return fmean(known) if known else None


def group_rows(rows: Iterable[Row]) -> list[Group]:
    """The 16-bit model, then settings in order; seeds of a setting together."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        setting = () if row.cell is None else row.cell.setting
        groups.setdefault(setting, []).append(row)
    ordered = sorted(groups.items(), key=lambda item: item[0][:-1])
    return [Group(tuple(found)) for _, found in ordered]


def metrics_of(rows: Sequence[Row]) -> list[Metric]:
    """All that was measured, in the order of the tasks."""
    return list(dict.fromkeys((s.task, s.metric) for row in rows for s in row.scores))


def metric_name(metric: Metric) -> str:
    """As people read it."""
    task, name = metric
    return f"{task} {name.replace('_', ' ')}"


def write_table(rows: Sequence[Row]) -> str:
    """A line a setting: means over seeds, ± between seeds, recovery in brackets."""
    metrics = metrics_of(rows)
    names = ["method", "bits", "group", "calibrated on", "options", "effective bits"]
    columns = [*names, "seeds", *map(metric_name, metrics)]
    lines = [_line(columns), _line(["---"] * len(columns))]
    for group in group_rows(rows):
        figures = [_figure(group, metric) for metric in metrics]
        lines.append(_line([*_setting_cells(group), *figures]))
    chance = {(s.task, s.metric): s.chance for row in rows for s in row.scores}
    if any(chance.values()):
        by_lot = ["" if chance[m] is None else f"{chance[m]:g}" for m in metrics]
        lines.append(_line(["by chance", *[""] * 6, *by_lot]))
    return "\n".join(lines) + "\n"


def _setting_cells(group: Group) -> list[str]:
    cell = group.rows[0].cell
    if cell is None:
        return ["16-bit", "", "", "", "", "16", ""]
    seeds = sorted({row.cell.seed for row in group.rows if row.cell is not None})
    bits, size, source, options, method = cell.setting
    return [
        method,
        str(bits),
        "row" if size == -1 else str(size),
        source,
        options,
        f"{group.effective_bits:.3f}",
        " ".join(map(str, seeds)),
    ]


def _figure(group: Group, metric: Metric) -> str:
    value, recovery = group.value(metric), group.recovery(metric)
    if value is None:
        return ""
    scores = group.scores(metric)
    spread = f" ± {stdev(s.value for s in scores):.2g}" if len(scores) > 1 else ""
    share = "" if recovery is None else f" ({recovery:.1f} %)"
    return f"{value:.4g}{spread}{share}"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
