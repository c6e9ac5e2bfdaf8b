import json
from pathlib import Path

import pytest

from tacq_vllm.scores import SCORES_NAME, Score, Scores, ScoresError, read_scores

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


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ("not JSON", "Invalid JSON"),
        ({"scores": [SCORE]}, "versions: Field required"),
        ({"scores": [], "versions": {}}, "scores: "),
        ({"scores": [SCORE | {"value": "nan"}], "versions": {}}, "scores.0.value: "),
        ({"scores": [SCORE | {"extra": 1}], "versions": {}}, "scores.0.extra: "),
    ],
)
def test_malformed_scores(tmp_path: Path, content: object, fault: str) -> None:
    text = content if isinstance(content, str) else json.dumps(content)
    (tmp_path / SCORES_NAME).write_text(text)

    with pytest.raises(ScoresError, match=SCORES_NAME) as refusal:
        read_scores(tmp_path)

    assert fault in str(refusal.value)
    assert "\n" not in str(refusal.value)
