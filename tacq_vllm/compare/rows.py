"""What is known of each model: a JSON file a row, written when it is measured."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from tacq_vllm.compare.matrix import Cell
from tacq_vllm.config import one_line
from tacq_vllm.format.staging import staged_file
from tacq_vllm.scores import Score, ScoresError

RESULTS_NAME = "results.json"


class Row(BaseModel):
    """One model and its scores."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field(description="The base model's name.")
    cell: Cell | None = Field(None, description="None: the base model in 16 bits.")
    effective_bits: float = Field(16.0, description="Of a quantized weight.")
    scores: tuple[Score, ...] = Field(description="One for each task and metric.")
    tasks: tuple[str, ...] = Field((), description="That were asked for.")
    settings: dict[str, str] = Field({}, description="Engine and protocol.")
    versions: dict[str, str] = Field({}, description="Of packages, by name.")
    machine: dict[str, str] = Field({}, description="Where it was measured, and when.")
    seconds: dict[str, float] = Field({}, description="Of each phase of quantizing.")
    peak_bytes: int | None = Field(
        None,
        description="Most memory in use at once since the run began, also for the rows "
        "before.",
    )

    def extended(self, new: Self) -> Self:
        """With the tasks of the same model that were measured later."""
        scores = {(s.task, s.metric): s for s in (*self.scores, *new.scores)}
        return self.model_copy(
            update={
                "scores": tuple(scores.values()),
                "tasks": self.tasks + new.tasks,
                "versions": self.versions | new.versions,
            }
        )

    def score(self, task: str, metric: str) -> Score | None:
        """The score of a task, if there is one."""
        found = (s for s in self.scores if (s.task, s.metric) == (task, metric))
        return next(found, None)


_ROWS = TypeAdapter(list[Row])


def read_row(path: Path) -> Row | None:
    """A row that an earlier run has finished; None: there is none.

    Raises:
        ScoresError: the file is something else.
    """
    if not path.is_file():
        return None
    try:
        return Row.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise ScoresError(f"{path}: {one_line(error)}") from error


def write_row(path: Path, row: Row) -> None:
    """Store a row, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with staged_file(path) as staging:
        staging.write_text(row.model_dump_json(indent=1) + "\n", encoding="utf-8")


def write_results(path: Path, rows: Sequence[Row]) -> None:
    """Store all rows in one file."""
    content = _ROWS.dump_python(list(rows), mode="json")
    with staged_file(path) as staging:
        staging.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def with_baselines(rows: Iterable[Row], base: Row) -> list[Row]:
    """Put the 16-bit model's scores beside those of every row."""

    def beside(score: Score) -> Score:
        theirs = base.score(score.task, score.metric)
        return score.model_copy(update={"baseline": theirs and theirs.value})

    return [
        row.model_copy(update={"scores": tuple(map(beside, row.scores))})
        for row in rows
    ]
