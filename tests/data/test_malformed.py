import json
from pathlib import Path
from typing import Any

import pytest

from tacq_vllm.data.sets import NAMED_SETS, Split
from tests.builders import write_lines
from tests.data.conftest import LINES, TEST_TEXT, choice, failure, query


def test_unknown_set(root: Path) -> None:
    message = failure("wikitext", "calibration", root)
    assert message == f"wikitext: no such set; there are {', '.join(NAMED_SETS)}"


@pytest.mark.parametrize(
    "file",
    [*LINES, "spider/schemas.json", "wikitext2/train.txt", "wikitext2/test.txt"],
)
def test_missing_file(root: Path, file: str) -> None:
    (root / file).unlink()
    message = failure(file.split("/")[0], "calibration", root)
    assert message.startswith(f"{root / file}: no such file")


@pytest.mark.parametrize(
    ("file", "row"),
    [
        ("c4/c4_segments.jsonl", "text"),
        ("c4/c4_segments.jsonl", {"text": None}),
        ("mmlu/dev.jsonl", choice("art", "q", "E")),
        ("mmlu/dev.jsonl", choice("art", "q", 4)),
        ("mmlu/test.jsonl", choice("art", "q", answer=True)),
        ("mmlu/test.jsonl", choice("art", "q") | {"choices": ["a", "b", "c"]}),
        ("mmlu/test.jsonl", choice("art", "q") | {"choices": "abcd"}),
        ("mmlu/test.jsonl", choice("art", "q") | {"subject": 3}),
        ("gsm8k/train.jsonl", {"question": "q"}),
        ("gsm8k/dev.jsonl", {"question": "q", "answer": 3}),
        ("spider/train.jsonl", {"db_id": "cats", "question": "q"}),
        ("spider/dev.jsonl", query("cats", "q") | {"db_id": ["cats"]}),
    ],
)
def test_malformed_row(root: Path, file: str, row: Any) -> None:
    write_lines(root / file, [*LINES[file], row])
    message = failure(file.split("/")[0], "calibration", root)
    assert message.startswith(f"{root / file}, line {len(LINES[file]) + 1}: ")
    assert "`" in message


def test_database_without_a_schema(root: Path) -> None:
    write_lines(root / "spider/train.jsonl", [query("birds", "How high?")])
    message = failure("spider", "calibration", root)
    where = f"{root / 'spider/train.jsonl'}, line 1"
    assert message == f"{where}: no schema of the database 'birds'"


@pytest.mark.parametrize(
    ("schemas", "fault"),
    [([], ": not an object"), ({"cats": "CREATE"}, ", 'cats': `ddl` is not")],
)
def test_malformed_schemas(root: Path, schemas: Any, fault: str) -> None:
    path = root / "spider/schemas.json"
    path.write_text(json.dumps(schemas))
    assert failure("spider", "evaluation", root).startswith(f"{path}{fault}")


@pytest.mark.parametrize(
    ("file", "kept", "fault"),
    [
        ("gsm8k/train.jsonl", 7, "gsm8k train: 7 rows, fewer than the 8"),
        ("mmlu/dev.jsonl", 4, "mmlu dev: 4 questions of 'art', fewer than the 5"),
    ],
)
def test_too_few_shots(root: Path, file: str, kept: int, fault: str) -> None:
    write_lines(root / file, LINES[file][:kept])
    assert failure(file.split("/")[0], "evaluation", root).startswith(fault)


@pytest.mark.parametrize(
    ("file", "content", "split"),
    [
        ("wikitext2/train.txt", TEST_TEXT, "calibration"),
        ("wikitext2/test.txt", " \n", "evaluation"),
        ("c4/c4_segments.jsonl", '{"text": " "}\n' * 8, "evaluation"),
        ("spider/train.jsonl", "", "calibration"),
    ],
)
def test_nothing_left(root: Path, file: str, content: str, split: Split) -> None:
    (root / file).write_text(content)
    name = file.split("/")[0]
    assert failure(name, split, root).startswith(f"{name}: nothing for {split} in ")
