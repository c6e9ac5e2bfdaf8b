"""The named sets, each in two splits that share no document and no question."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from tacq_vllm.data.errors import DataError
from tacq_vllm.data.files import find_file, read_json_lines, read_text
from tacq_vllm.data.prompts import (
    MultipleChoice,
    WordProblem,
    format_gsm8k,
    format_mmlu,
    format_spider,
)
from tacq_vllm.data.schemas import read_schemas
from tacq_vllm.data.tables import HubTable, Table, read_hub, read_rows

NAMED_SETS = ("wikitext2", "c4", "mmlu", "gsm8k", "spider")

Split = Literal["calibration", "evaluation"]

_T = TypeVar("_T")
_Reader = Callable[[Split, Path | None], Iterable[tuple[str, _T]]]
"""Reads a split: pairs of the text that no other split may hold, and the sample."""

_MMLU_SHOTS = 5
_GSM8K_SHOTS = 8
_ANSWERS = dict(zip((*range(4), *"ABCD"), "ABCD" * 2, strict=True))
"""The letter of a choice, which the Hub gives as a number."""

_WIKITEXT2_FILES: dict[Split, tuple[str, ...]] = {
    "calibration": ("wikitext2/train.txt", "wikitext2/train_excerpt.txt"),
    "evaluation": ("wikitext2/test.txt",),
}
_WIKITEXT2: dict[Split, HubTable] = {
    "calibration": HubTable("Salesforce/wikitext", "train", "wikitext-2-raw-v1"),
    "evaluation": HubTable("Salesforce/wikitext", "test", "wikitext-2-raw-v1"),
}
_C4_FILE = "c4/c4_segments.jsonl"
_C4: dict[Split, HubTable] = {
    "calibration": HubTable(
        "allenai/c4", "train", data_file="en/c4-train.00000-of-01024.json.gz"
    ),
    "evaluation": HubTable(
        "allenai/c4", "validation", data_file="en/c4-validation.00000-of-00008.json.gz"
    ),
}
_MMLU_DEV = Table("mmlu/dev.jsonl", HubTable("cais/mmlu", "dev", "all"))
_MMLU_TEST = Table("mmlu/test.jsonl", HubTable("cais/mmlu", "test", "all"))
_GSM8K: dict[Split, Table] = {
    "calibration": Table(
        "gsm8k/train.jsonl", HubTable("openai/gsm8k", "train", "main")
    ),
    "evaluation": Table("gsm8k/dev.jsonl", HubTable("openai/gsm8k", "test", "main")),
}
_SPIDER: dict[Split, Table] = {
    "calibration": Table("spider/train.jsonl", HubTable("xlangai/spider", "train")),
    "evaluation": Table("spider/dev.jsonl", HubTable("xlangai/spider", "validation")),
}


@dataclass(frozen=True)
class Item:
    """A question as the model is asked it, and the answer it should give."""

    prompt: str
    completion: str
    group: str
    """MMLU's subject, Spider's database, or empty."""


@dataclass(frozen=True)
class NamedSet:
    """One split of a named set: running text or questions, the other being empty."""

    documents: tuple[str, ...] = ()
    items: tuple[Item, ...] = ()


def load_named_set(name: str, split: Split, data_root: Path | None) -> NamedSet:
    """Read a split from `data_root` (docs/data.md) or, without one, from the Hub.

    What is for calibration is compared with the evaluation split, which is read too:
    a document or a question that occurs in both is left to evaluation.

    Raises:
        DataError: the name is unknown, a file or the Hub cannot be read, a row is
            malformed, or nothing is left.
    """
    if name in _DOCUMENTS:
        return NamedSet(documents=_load(name, _DOCUMENTS[name], split, data_root))
    if name in _ITEMS:
        return NamedSet(items=_load(name, _ITEMS[name], split, data_root))
    raise DataError(f"{name}: no such set; there are {', '.join(NAMED_SETS)}")


def _load(
    name: str, reader: _Reader[_T], split: Split, data_root: Path | None
) -> tuple[_T, ...]:
    held_out: set[str] = set()
    if split == "calibration":
        held_out = {_normalize(key) for key, _ in reader("evaluation", data_root)}
    pairs = reader(split, data_root)
    samples = tuple(sample for key, sample in pairs if _normalize(key) not in held_out)
    if not samples:
        raise DataError(
            f"{name}: nothing for {split} in {data_root or 'the Hub'}: the source is "
            "empty, or all of it is for evaluation; complete the files"
        )
    return samples


def _normalize(text: str) -> str:
    return " ".join(text.split()).casefold()


def _cut(rows: list[_T], split: Split) -> list[_T]:
    """The first three quarters for calibration, the rest for evaluation."""
    boundary = len(rows) * 3 // 4
    return rows[:boundary] if split == "calibration" else rows[boundary:]


def _read_wikitext2(split: Split, data_root: Path | None) -> Iterator[tuple[str, str]]:
    if data_root is not None:
        text = read_text(find_file(data_root, *_WIKITEXT2_FILES[split]))
    else:
        rows = read_hub(_WIKITEXT2[split])
        # The Hub has emptied the blank lines, which are a space in the file.
        text = "".join(_text(where, row) or " \n" for where, row in rows)
    if text.strip():
        yield text, text


def _read_c4(split: Split, data_root: Path | None) -> Iterator[tuple[str, str]]:
    rows: Iterable[tuple[str, Any]]
    if data_root is not None:
        file = find_file(data_root, _C4_FILE)
        rows = _cut(list(read_json_lines(file)), split)
    else:
        rows = read_hub(_C4[split])
    for where, row in rows:
        text = _text(where, row)
        if text.strip():
            yield text, text


def _text(where: str, row: Any) -> str:
    match row:
        case {"text": str(text)}:
            return text
    raise DataError(f"{where}: `text` is not a string")


def _read_mmlu(split: Split, data_root: Path | None) -> Iterator[tuple[str, Item]]:
    solved = _by_subject(_MMLU_DEV, data_root)
    for subject, questions in _by_subject(_MMLU_TEST, data_root).items():
        shots = solved[subject][:_MMLU_SHOTS]
        if len(shots) < _MMLU_SHOTS:
            raise DataError(
                f"mmlu dev: {len(shots)} questions of {subject!r}, fewer than the "
                f"{_MMLU_SHOTS} that its prompts show"
            )
        for asked in _cut(questions, split):
            prompt, completion = format_mmlu(subject, shots, asked)
            yield asked.question, Item(prompt, completion, subject)


def _by_subject(
    table: Table, data_root: Path | None
) -> defaultdict[str, list[MultipleChoice]]:
    subjects: defaultdict[str, list[MultipleChoice]] = defaultdict(list)
    for where, row in read_rows(table, data_root):
        match row:
            case {
                "subject": str(subject),
                "question": str(question),
                "choices": [str(a), str(b), str(c), str(d)],
                "answer": int() | str() as answer,
            } if answer in _ANSWERS and not isinstance(answer, bool):
                item = MultipleChoice(question, (a, b, c, d), _ANSWERS[answer])
                subjects[subject].append(item)
            case _:
                raise DataError(
                    f"{where}: not `subject`, `question`, four `choices` and an "
                    "`answer` of A to D or 0 to 3"
                )
    return subjects


def _read_gsm8k(split: Split, data_root: Path | None) -> Iterator[tuple[str, Item]]:
    train = _problems(_GSM8K["calibration"], data_root)
    shots, rest = train[:_GSM8K_SHOTS], train[_GSM8K_SHOTS:]
    if len(shots) < _GSM8K_SHOTS:
        raise DataError(
            f"gsm8k train: {len(shots)} rows, fewer than the {_GSM8K_SHOTS} that "
            "every prompt shows"
        )
    if split == "evaluation":
        rest = _problems(_GSM8K["evaluation"], data_root)
    for asked in rest:
        prompt, completion = format_gsm8k(shots, asked)
        yield asked.question, Item(prompt, completion, group="")


def _problems(table: Table, data_root: Path | None) -> list[WordProblem]:
    problems = []
    for where, row in read_rows(table, data_root):
        match row:
            case {"question": str(question), "answer": str(answer)}:
                problems.append(WordProblem(question, answer))
            case _:
                raise DataError(
                    f"{where}: `question` and `answer` are not both strings"
                )
    return problems


def _read_spider(split: Split, data_root: Path | None) -> Iterator[tuple[str, Item]]:
    schemas = read_schemas(data_root)
    for where, row in read_rows(_SPIDER[split], data_root):
        match row:
            case {"db_id": str(db), "question": str(question), "query": str(query)}:
                if db not in schemas:
                    raise DataError(f"{where}: no schema of the database {db!r}")
                prompt, completion = format_spider(schemas[db], question, query)
                yield question, Item(prompt, completion, db)
            case _:
                raise DataError(
                    f"{where}: `db_id`, `question` and `query` are not all strings"
                )


_DOCUMENTS: dict[str, _Reader[str]] = {"wikitext2": _read_wikitext2, "c4": _read_c4}
_ITEMS: dict[str, _Reader[Item]] = {
    "mmlu": _read_mmlu,
    "gsm8k": _read_gsm8k,
    "spider": _read_spider,
}
