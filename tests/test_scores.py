import json
from pathlib import Path

import pytest

from tacq_vllm.scores import (
    SCORES_NAME,
    Score,
    Scores,
    ScoresError,
    read_scores,
    read_scores_file,
)

SCORE = {"task": "c4", "metric": "perplexity", "value": 20.5}


def test_what_is_written_is_read(tmp_path: Path) -> None:
    scores = Scores(
        scores=(Score(task="c4", metric="perplexity", value=20.5, limit=8),),
        versions={"torch": "2.13.0"},
    )
    (tmp_path / SCORES_NAME).write_text(scores.model_dump_json())

    assert read_scores(tmp_path) == scores


def test_no_file(tmp_path: Path) -> None:
    assert read_scores(tmp_path) is None
    with pytest.raises(ScoresError, match=r"x\.json: No such file or directory; give"):
        read_scores_file(tmp_path / "x.json")


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ("not JSON", "Invalid JSON"),
        ({"scores": [SCORE]}, "versions: Field required"),
        ({"scores": [], "versions": {}}, "scores: "),
        ({"scores": [SCORE | {"value": "nan"}], "versions": {}}, "scores.0.value: "),
        ({"scores": [SCORE | {"extra": 1}], "versions": {}}, "scores.0.extra: "),
        ({"scores": [SCORE | {"limit": 0}], "versions": {}}, "scores.0.limit: "),
    ],
)
def test_malformed_scores(tmp_path: Path, content: object, fault: str) -> None:
    text = content if isinstance(content, str) else json.dumps(content)
    (tmp_path / SCORES_NAME).write_text(text)

    with pytest.raises(ScoresError, match=SCORES_NAME) as refusal:
        read_scores(tmp_path)

    assert fault in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("metric", "value", "baseline", "recovery"),
    [
        ("perplexity", 40.0, 20.0, 50.0),
        ("loss", 1.0, 1.25, 125.0),
        ("accuracy", 0.3, 0.6, 50.0),
        ("accuracy", 0.0, 0.5, 0.0),
        ("accuracy", 0.5, 0.0, None),
        ("accuracy", 0.5, None, None),
    ],
)
def test_recovery(
    metric: str, value: float, baseline: float | None, recovery: float | None
) -> None:
    score = Score(task="c4", metric=metric, value=value, baseline=baseline)

    assert score.recovery == recovery
