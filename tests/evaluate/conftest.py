"""Data to evaluate on, and small models that answer."""

import json
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tacq_vllm.evaluate.respondent import Respondent
from tacq_vllm.evaluate.runner import Continuation, Likelihood, Prompt
from tacq_vllm.evaluate.samples import SampleLog
from tacq_vllm.quantize.progress import Progress
from tests.builders import write_lines
from tests.conftest import Recorder, make_text
from tests.data.conftest import LINES, SCHEMAS


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of every named set; tests change copies of it only."""
    return make_data(tmp_path_factory.mktemp("evaluation"))


def make_data(folder: Path) -> Path:
    """Fill a folder with every named set, and a database of dogs."""
    for name, rows in LINES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_lines(folder / name, rows)
    texts = [{"text": f"{word} {make_text(40)}"} for word in "river city song".split()]
    write_lines(folder / "c4/c4_segments.jsonl", texts)
    (folder / "spider/schemas.json").write_text(json.dumps(SCHEMAS))
    make_database(folder / "spider/database/dogs/dogs.sqlite")
    (folder / "wikitext2").mkdir()
    (folder / "wikitext2/train.txt").write_text("the old river .")
    (folder / "wikitext2/test.txt").write_text(make_text())
    return folder


def make_database(path: Path) -> Path:
    """Three dogs in a SQLite file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE dogs (name text, age integer)")
    rows = [("Rex", 3), ("Ada", 5), ("Bo", 3)]
    connection.executemany("INSERT INTO dogs VALUES (?, ?)", rows)
    connection.commit()
    connection.close()
    return path


class Parrot:
    """A runner without a model: a token is a character, an answer is given."""

    name = "parrot"
    identity = "parrot"
    dtype = "float32"
    versions = {"tacq-vllm": "0"}  # noqa: RUF012

    def __init__(self, answer: str = "", max_length: int = 10_000) -> None:
        self.max_length = max_length
        self.asked: list[Any] = []
        self._answer = answer

    def tokenizer(self, text: str, **options: Any) -> Any:
        return SimpleNamespace(input_ids=[ord(letter) for letter in text])

    def likelihoods(self, asked: Sequence[Continuation]) -> Iterator[Likelihood]:
        """A half for each token; a tenth for the letter B."""
        for one in asked:
            self.asked.append(one)
            text = "".join(map(chr, one.tokens))
            yield Likelihood(-0.1 if text == " B" else -0.5 * len(text), False)

    def texts(self, asked: Sequence[Prompt]) -> Iterator[str]:
        for one in asked:
            self.asked.append(one)
            yield self._answer


def respond(
    runner: Any, log: SampleLog | None = None, listener: Recorder | None = None
) -> Respondent:
    return Respondent(runner, log or SampleLog(None), Progress(listener))
