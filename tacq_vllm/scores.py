"""The scores of a checkpoint, as a file beside its weights."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tacq_vllm.config import one_line

SCORES_NAME = "scores.json"


class ScoresError(ValueError):
    """A score file that cannot be read; the message says why."""


class Score(BaseModel):
    """One figure that a task gave, beside that of the unquantized model."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    task: str = Field(min_length=1, description="Name of the data set or benchmark.")
    metric: str = Field(min_length=1, description="perplexity, accuracy, …")
    value: float = Field(description="Of this checkpoint.")
    stderr: float | None = Field(None, description="Standard error of the value.")
    baseline: float | None = Field(
        None, description="Of the 16-bit model, by the same harness on the same items."
    )
    limit: int | None = Field(
        None, ge=1, description="Items or windows, where not all were used."
    )


class Scores(BaseModel):
    """All figures of a checkpoint."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    scores: tuple[Score, ...] = Field(
        min_length=1, description="One for each task and metric."
    )
    versions: dict[str, str] = Field(
        description="Version of each package that took part, by its name."
    )


def read_scores(folder: Path) -> Scores | None:
    """Read the scores of a checkpoint folder; None where it has none.

    Raises:
        ScoresError: the file is not what `Scores` describes.
    """
    path = folder / SCORES_NAME
    if not path.is_file():
        return None
    try:
        return Scores.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise ScoresError(f"{path}: {one_line(error)}") from error
