"""The Hub, through a stand-in for `datasets` whose rows have the Hub's columns."""

import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tacq_vllm.data.sets import NAMED_SETS
from tests.data.conftest import DEV, LINES, TEST, both_splits, failure, problem

NUMBERED = [row | {"answer": "ABCD".index(row["answer"])} for row in TEST]
HUB: dict[tuple[Any, ...], list[dict[str, Any]]] = {
    ("Salesforce/wikitext", "wikitext-2-raw-v1", "train", None): [
        {"text": text} for text in (" = Cats = \n", "", " Cats sleep . \n")
    ],
    ("Salesforce/wikitext", "wikitext-2-raw-v1", "test", None): [
        {"text": text} for text in (" = Dogs = \n", "", " Dogs bark . \n")
    ],
    ("allenai/c4", None, "train", "en/c4-train.00000-of-01024.json.gz"): [
        {"text": text, "timestamp": None, "url": ""} for text in "abcd"
    ],
    ("allenai/c4", None, "validation", "en/c4-validation.00000-of-00008.json.gz"): [
        {"text": text, "timestamp": None, "url": ""} for text in "cxy"
    ],
    ("cais/mmlu", "all", "dev", None): [row | {"answer": 1} for row in DEV],
    ("cais/mmlu", "all", "test", None): NUMBERED,
    ("openai/gsm8k", "main", "train", None): LINES["gsm8k/train.jsonl"],
    ("openai/gsm8k", "main", "test", None): LINES["gsm8k/dev.jsonl"],
    ("xlangai/spider", None, "train", None): LINES["spider/train.jsonl"],
    ("xlangai/spider", None, "validation", None): LINES["spider/dev.jsonl"],
    ("richardr1126/spider-schema", None, "train", None): [
        {
            "db_id": "cats",
            "Schema (values (type))": "cat : Cat_ID (number) , Pet Name (text) | "
            "owner : Votes_(millions) (number)",
            "Primary Keys": "cat : Cat_ID",
            "Foreign Keys": "",
        },
        {"db_id": "dogs", "Schema (values (type))": "dog : Dog_ID (number)"},
    ],
}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    """Installs a `datasets` whose `load_dataset` reads HUB, or is another one."""

    def load_dataset(
        path: str,
        name: str | None = None,
        *,
        split: str,
        data_files: dict[str, str] | None = None,
    ) -> list[dict[str, Any]]:
        file = None if data_files is None else data_files[split]
        return HUB[path, name, split, file]

    def install(other: Any = None) -> None:
        module = SimpleNamespace(load_dataset=other or load_dataset)
        monkeypatch.setitem(sys.modules, "datasets", module)

    install()
    return install


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize("name", ["wikitext2", "mmlu", "gsm8k"])
def test_the_hub_gives_what_the_files_give(root: Path, name: str) -> None:
    assert both_splits(name, None) == both_splits(name, root)


@pytest.mark.usefixtures("hub")
def test_c4_of_the_hub_has_its_own_splits() -> None:
    calibration, evaluation = both_splits("c4", None)
    assert calibration.documents == ("a", "b", "d")
    assert evaluation.documents == ("c", "x", "y")


@pytest.mark.usefixtures("hub")
def test_spider_of_the_hub_writes_the_schema() -> None:
    calibration, evaluation = both_splits("spider", None)
    assert [item.prompt for item in calibration.items] == [
        'CREATE TABLE "cat" (\n'
        '  "Cat_ID" number,\n'
        '  "Pet Name" text\n'
        ");\n"
        'CREATE TABLE "owner" (\n'
        '  "Votes_(millions)" number\n'
        ");\n\n"
        "-- Question: Which cats?\n"
        "-- SQL:\n"
    ]
    assert [item.group for item in evaluation.items] == ["dogs", "dogs"]


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({"db_id": "cats", "Schema": ""}, "are not both strings"),
        ({"db_id": "cats", "Schema (values (type))": "cat : ID"}, "'ID'"),
    ],
)
def test_malformed_schema_of_the_hub(
    hub: Callable[[Any], None], row: dict[str, str], fault: str
) -> None:
    hub(lambda *_args, **_options: [row])
    message = failure("spider", "evaluation", None)
    assert message.startswith("richardr1126/spider-schema train, row 1: ")
    assert fault in message


def test_malformed_row_of_the_hub(hub: Callable[[Any], None]) -> None:
    hub(lambda *_args, **_options: [problem("a"), {"question": "b"}])
    message = failure("gsm8k", "evaluation", None)
    assert message.startswith("openai/gsm8k train, row 2: ")


@pytest.mark.parametrize("name", NAMED_SETS)
def test_without_datasets(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    message = failure(name, "evaluation", None)
    assert "pip install 'tacq-vllm[quantize]'" in message
    assert "--data-root" in message


@pytest.mark.parametrize("name", NAMED_SETS)
@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("Couldn't reach the Hub\n(offline)"),
        OSError("no space left"),
        ValueError("no such configuration"),
        type("DatasetsError", (Exception,), {})("other splits were expected"),
    ],
)
def test_hub_that_fails(
    hub: Callable[[Any], None], name: str, error: Exception
) -> None:
    def load_dataset(*_args: object, **_options: object) -> None:
        raise error

    hub(load_dataset)
    message = failure(name, "evaluation", None)
    assert " ".join(str(error).split()) in message
    assert "--data-root" in message


def test_hub_that_fails_between_rows(hub: Callable[[Any], None]) -> None:
    def load_dataset(*_args: object, **_options: object) -> Iterable[Any]:
        yield {"text": "a"}
        raise OSError("the shard is damaged")

    hub(load_dataset)
    assert "the shard is damaged; give the files" in failure("c4", "evaluation", None)
