from pathlib import Path

import pytest
import torch

from tacq_vllm.evaluate.backends import Backend
from tacq_vllm.evaluate.errors import EvaluateError
from tacq_vllm.evaluate.evaluation import check_baseline, with_baseline
from tacq_vllm.evaluate.tasks import Protocol
from tacq_vllm.scores import Score, Scores

SETTINGS = {"model": "a", "backend": "hf", "window": "1024"}


def scores(*rows: Score, **settings: str) -> Scores:
    return Scores(scores=rows, versions={}, settings=SETTINGS | settings)


def test_a_baseline_stands_beside_each_score() -> None:
    mine = scores(
        Score(task="c4", metric="perplexity", value=20.0),
        Score(task="mmlu", metric="accuracy", value=0.3, limit=4),
    )
    theirs = scores(
        Score(task="mmlu", metric="accuracy", value=0.4, limit=4),
        Score(task="c4", metric="perplexity", value=15.0),
        Score(task="gsm8k", metric="loss", value=1.0),
        model="b",
    )

    perplexity, accuracy = with_baseline(mine, theirs).scores

    assert (perplexity.baseline, accuracy.baseline) == (15.0, 0.4)
    assert perplexity.recovery == pytest.approx(75.0)
    assert accuracy.recovery == pytest.approx(75.0)


def test_a_baseline_that_lacks_a_score() -> None:
    baseline = scores(Score(task="c4", metric="perplexity", value=1.0, limit=8))
    figures = [("c4", "perplexity")]

    check_baseline(baseline, SETTINGS, figures, 8)
    with pytest.raises(EvaluateError, match="no perplexity of c4 with limit 4"):
        check_baseline(baseline, SETTINGS, figures, 4)


def test_a_baseline_that_was_measured_otherwise() -> None:
    baseline = scores(
        Score(task="c4", metric="perplexity", value=1.0), window="512", model="b"
    )

    check_baseline(baseline, {"backend": "hf", "window": "512"}, [], None)
    with pytest.raises(EvaluateError, match="with window 512, this model is to be"):
        check_baseline(baseline, {"backend": "hf", "window": "1024"}, [], None)


def test_what_scores_that_are_compared_have_in_common() -> None:
    backend = Backend("vllm", "bfloat16", 128, torch.device("cpu"), dequantize=False)

    assert backend.settings == {
        "backend": "vllm",
        "dtype": "bfloat16",
        "max_length": "128",
    }
    assert Protocol(None, 3, 64).settings == {"data": "Hub", "window": "64"}
    assert Protocol(Path("x"), 3, 64).settings["data"] == "folder"
