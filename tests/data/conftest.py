"""A folder of every named set, with questions that occur in both splits."""

import json
from pathlib import Path
from typing import Any

import pytest

from tacq_vllm.data.errors import DataError
from tacq_vllm.data.sets import NamedSet, Split, load_named_set
from tests.builders import write_lines

TRAIN_TEXT = " = Cats = \n \n Cats sleep . \n"
TEST_TEXT = " = Dogs = \n \n Dogs bark . \n"


def choice(subject: str, question: str, answer: str | int = "B") -> dict[str, Any]:
    choices = [f"{question} {letter}" for letter in "wxyz"]
    fields = {"subject": subject, "question": question, "choices": choices}
    return fields | {"answer": answer}


def problem(question: str) -> dict[str, str]:
    return {"question": question, "answer": f"<<1=1>>1 for {question}\n#### 1"}


def query(db: str, question: str) -> dict[str, str]:
    return {"db_id": db, "question": question, "query": f"SELECT '{question}'"}


DEV = [choice(subject, f"solved {n}") for subject in ("art", "law") for n in range(6)]
TEST = [
    *(choice("art", f"art {n}") for n in range(5)),
    choice("law", "law 0"),
    choice("art", "Which  is it?"),
    choice("art", "art 6"),
    choice("art", "art 7", "D"),
    choice("law", "Law 3"),
    choice("law", "law 2"),
    choice("law", "which is it? ", "A"),
]
"""Eight of art, one of which asks what the last of law's four asks."""
SHOTS = [problem(f"shot {n}") for n in range(8)]
LINES = {
    "c4/c4_segments.jsonl": [
        {"text": text} for text in ("a", "b", "Same\ntext", "d", "e", "f", "g")
    ]
    + [{"text": "same text"}],
    "mmlu/dev.jsonl": DEV,
    "mmlu/test.jsonl": TEST,
    "gsm8k/train.jsonl": [*SHOTS, *map(problem, ("one", "Both?", "two"))],
    "gsm8k/dev.jsonl": [problem("both?"), problem("three")],
    "spider/train.jsonl": [query("cats", "How many?"), query("cats", "Which cats?")],
    "spider/dev.jsonl": [query("dogs", "how many?"), query("dogs", "Which dogs?")],
}
SCHEMAS = {db: {"ddl": f"CREATE TABLE {db} (name text);"} for db in ("cats", "dogs")}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name, rows in LINES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_lines(tmp_path / name, rows)
    (tmp_path / "spider/schemas.json").write_text(json.dumps(SCHEMAS))
    (tmp_path / "wikitext2").mkdir()
    (tmp_path / "wikitext2/train.txt").write_text(TRAIN_TEXT)
    (tmp_path / "wikitext2/test.txt").write_text(TEST_TEXT)
    return tmp_path


def both_splits(name: str, data_root: Path | None) -> tuple[NamedSet, NamedSet]:
    calibration = load_named_set(name, "calibration", data_root)
    evaluation = load_named_set(name, "evaluation", data_root)
    return calibration, evaluation


def failure(name: str, split: Split, data_root: Path | None) -> str:
    with pytest.raises(DataError) as error:
        load_named_set(name, split, data_root)
    message = str(error.value)
    assert "\n" not in message
    return message
