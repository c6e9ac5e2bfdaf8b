"""Queries that a model writes for questions, and what they count."""

import json
import math
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tacq_vllm.data.sets import Item
from tacq_vllm.evaluate import spider
from tacq_vllm.evaluate.errors import EvaluateError
from tacq_vllm.evaluate.questions import Questions
from tacq_vllm.evaluate.runner import Prompt
from tacq_vllm.evaluate.samples import SampleLog
from tests.evaluate.conftest import Parrot, make_database, respond

GOLD = "SELECT count(*) FROM dogs"


class Writer(Parrot):
    """Answers each prompt with what it is given for it."""

    def __init__(self, answers: dict[str, str]) -> None:
        super().__init__()
        self._answers = answers

    def texts(self, asked: Sequence[Prompt]) -> Iterator[str]:
        for one in asked:
            self.asked.append(one)
            yield self._answers["".join(map(chr, one.tokens))]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for name in ("dogs", "pups"):
        make_database(tmp_path / f"spider/database/{name}/{name}.sqlite")
    connection = sqlite3.connect(tmp_path / "spider/database/pups/pups.sqlite")
    connection.execute("DELETE FROM dogs WHERE age > 3")
    connection.commit()
    connection.close()
    return tmp_path


def test_what_fails_is_as_wrong_as_what_is_wrong(data: Path, tmp_path: Path) -> None:
    answers = {
        "a": " SELECT 3\n",
        "b": "SELECT 2",
        "c": "SELECT breed FROM dogs",
        "d": "",
        "e": "SELECT 2",
    }
    groups = ["dogs"] * 4 + ["pups"]
    items = [Item(key, GOLD, db) for key, db in zip(answers, groups, strict=True)]
    questions = Questions.spread("spider", items, None)
    databases = spider.find_databases(questions, data)
    writer, log = Writer(answers), tmp_path / "log.jsonl"

    (score,) = spider.execution_accuracy(
        questions, databases, respond(writer, SampleLog(log))
    )

    assert score.metric == "execution_accuracy"
    assert score.value == 0.4
    assert score.stderr == pytest.approx(math.sqrt((2 * 0.36 + 3 * 0.16) / 4 / 5))
    assert all(one.max_tokens == 192 for one in writer.asked)
    assert all(one.stops == (";", "\n\n", "\n--") for one in writer.asked)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    verdicts = [line["detail"] for line in lines if "detail" in line]
    assert verdicts[:2] == ["right", "wrong"]
    assert verdicts[2].startswith("fails: no such column")
    assert verdicts[3].startswith("fails: ")
    assert verdicts[4] == "right"


def test_a_right_query_that_fails_is_the_data_s_fault(data: Path) -> None:
    questions = Questions.spread("spider", [Item("a", "SELECT *", "dogs")], None)
    databases = spider.find_databases(questions, data)

    with pytest.raises(EvaluateError, match=r"dogs\.sqlite: 'SELECT \*' no tables"):
        spider.execution_accuracy(questions, databases, respond(Writer({"a": GOLD})))


def test_a_query_has_ten_seconds(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    judge, seconds = spider.Judge, []
    monkeypatch.setattr(
        spider, "Judge", lambda limit: seconds.append(limit) or judge(limit)
    )
    questions = Questions.spread("spider", [Item("a", GOLD, "dogs")], None)

    spider.execution_accuracy(
        questions,
        spider.find_databases(questions, data),
        respond(Writer({"a": "SELECT 3"})),
    )

    assert seconds == [10.0]
