"""The scores of a checkpoint, as a file beside its weights."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tacq_vllm.config import one_line

SCORES_NAME = "scores.json"


class ScoresError(ValueError):
    """A score file that cannot be read; the message says why."""


LOWER_IS_BETTER = ("perplexity", "loss")
"""Metrics; of all others, more is better."""


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
    chance: float | None = Field(
        None, description="What answers drawn by lot would give, where that is known."
    )
    limit: int | None = Field(
        None, ge=1, description="Items or windows, where not all were used."
    )

    @property
    def recovery(self) -> float | None:
        """What is left of the 16-bit model's score, in percent; None without it."""
        if self.baseline is None:
            return None
        parts = (self.value, self.baseline)
        whole, part = parts if self.metric in LOWER_IS_BETTER else parts[::-1]
        return 100 * part / whole if whole else None


class Scores(BaseModel):
    """All figures of a checkpoint."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    scores: tuple[Score, ...] = Field(
        min_length=1, description="One for each task and metric."
    )
    versions: dict[str, str] = Field(
        description="Version of each package that took part, by its name."
    )
    settings: dict[str, str] = Field(
        {}, description="Model, engine and protocol: what the scores depend on."
    )


def read_scores(folder: Path) -> Scores | None:
    """Read the scores of a checkpoint folder; None where it has none.

    Raises:
        ScoresError: the file is not what `Scores` describes.
    """
    path = folder / SCORES_NAME
    return read_scores_file(path) if path.is_file() else None


def read_scores_file(path: Path) -> Scores:
    """Read a score file.

    Raises:
        ScoresError: it cannot be read, or is not what `Scores` describes.
    """
    try:
        return Scores.model_validate_json(path.read_bytes())
    except OSError as error:
        raise ScoresError(f"{path}: {error.strerror}; give a file of scores") from error
    except ValidationError as error:
        raise ScoresError(f"{path}: no file of scores: {one_line(error)}") from error
