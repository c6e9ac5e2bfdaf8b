import gzip
import re
from collections import Counter
from pathlib import Path
from typing import get_args

import pytest

from tacq_vllm.data.sets import NAMED_SETS, Item, NamedSet, Split, load_named_set
from tests.builders import write_lines
from tests.data.conftest import (
    DEV,
    TEST_TEXT,
    TRAIN_TEXT,
    both_splits,
    choice,
)

REAL_DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"
ASKED = {
    "mmlu": re.compile(r".*Answer: [A-D]\n\n(.*)\nA\. ", re.DOTALL),
    "gsm8k": re.compile(r".*Question: (.*)\nAnswer:", re.DOTALL),
    "spider": re.compile(r".*\n-- Question: (.*)\n-- SQL:\n", re.DOTALL),
}
"""Takes the question that is asked out of a prompt."""
COUNTS: dict[str, dict[Split, int]] = {
    "wikitext2": {"calibration": 1, "evaluation": 1},
    "c4": {"calibration": 5, "evaluation": 2},
    "mmlu": {"calibration": 8, "evaluation": 3},
    "gsm8k": {"calibration": 2, "evaluation": 2},
    "spider": {"calibration": 1, "evaluation": 2},
}


def contents(name: str, loaded: NamedSet) -> list[str]:
    """Documents or asked questions, spelled alike."""
    texts = list(loaded.documents) or [asked(name, item) for item in loaded.items]
    return [" ".join(text.lower().split()) for text in texts]


def asked(name: str, item: Item) -> str:
    match = ASKED[name].match(item.prompt)
    assert match is not None
    return match[1]


def check_disjoint(name: str, data_root: Path) -> None:
    calibration, evaluation = both_splits(name, data_root)
    left, right = contents(name, calibration), contents(name, evaluation)
    assert left
    assert right
    assert not set(left) & set(right)


@pytest.mark.parametrize("name", NAMED_SETS)
def test_splits_do_not_overlap(root: Path, name: str) -> None:
    check_disjoint(name, root)


@pytest.mark.parametrize("name", NAMED_SETS)
@pytest.mark.parametrize("split", get_args(Split))
def test_counts(root: Path, name: str, split: Split) -> None:
    loaded = load_named_set(name, split, root)
    assert len(loaded.documents or loaded.items) == COUNTS[name][split]
    assert bool(loaded.documents) != bool(loaded.items)


@pytest.mark.parametrize("name", NAMED_SETS)
def test_gzipped_files_give_the_same(root: Path, name: str) -> None:
    plain = both_splits(name, root)
    for path in (root / name).iterdir():
        path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    assert both_splits(name, root) == plain


def test_wikitext2_is_the_files_text(root: Path) -> None:
    calibration, evaluation = both_splits("wikitext2", root)
    assert calibration.documents == (TRAIN_TEXT,)
    assert evaluation.documents == (TEST_TEXT,)


def test_wikitext2_takes_an_excerpt_where_the_whole_is_missing(root: Path) -> None:
    (root / "wikitext2/train_excerpt.txt").write_text("excerpt")
    assert load_named_set("wikitext2", "calibration", root).documents == (TRAIN_TEXT,)
    (root / "wikitext2/train.txt").unlink()
    assert load_named_set("wikitext2", "calibration", root).documents == ("excerpt",)


def test_c4_is_cut_after_three_quarters(root: Path) -> None:
    calibration, evaluation = both_splits("c4", root)
    assert calibration.documents == ("a", "b", "d", "e", "f")
    assert evaluation.documents == ("g", "same text")
    write_lines(root / "c4/c4_segments.jsonl", ({"text": str(n)} for n in range(42)))
    assert len(load_named_set("c4", "calibration", root).documents) == 31
    assert len(load_named_set("c4", "evaluation", root).documents) == 11


def test_mmlu_cuts_each_subject(root: Path) -> None:
    calibration, evaluation = both_splits("mmlu", root)
    assert [(item.group, asked("mmlu", item)) for item in calibration.items] == [
        *(("art", f"art {n}") for n in range(5)),
        ("law", "law 0"),
        ("law", "Law 3"),
        ("law", "law 2"),
    ]
    assert [(item.group, asked("mmlu", item)) for item in evaluation.items] == [
        ("art", "art 6"),
        ("art", "art 7"),
        ("law", "which is it?"),
    ]
    assert [item.completion for item in evaluation.items] == [" B", " D", " A"]


def test_mmlu_shows_five_solved_questions_of_the_subject(root: Path) -> None:
    foreign = [choice("law", f"foreign {n}") for n in range(6)]
    write_lines(root / "mmlu/dev.jsonl", foreign + DEV[:6])
    item = load_named_set("mmlu", "calibration", root).items[0]
    shown = re.findall(r"^(solved|foreign) (\d)$", item.prompt, re.MULTILINE)
    assert shown == [("solved", str(n)) for n in range(5)]


def test_gsm8k_shows_the_first_eight_of_train_in_both_splits(root: Path) -> None:
    calibration, evaluation = both_splits("gsm8k", root)
    shots = "".join(
        f"Question: shot {n}\nAnswer: 1 for shot {n}\n#### 1\n\n" for n in range(8)
    )
    assert [item.prompt for item in calibration.items] == [
        f"{shots}Question: {question}\nAnswer:" for question in ("one", "two")
    ]
    assert [item.prompt for item in evaluation.items] == [
        f"{shots}Question: {question}\nAnswer:" for question in ("both?", "three")
    ]
    assert calibration.items[0].completion == " 1 for one\n#### 1"
    assert calibration.items[0].group == ""


def test_spider_asks_over_the_schema(root: Path) -> None:
    (item,) = load_named_set("spider", "calibration", root).items
    assert item == Item(
        "CREATE TABLE cats (name text);\n\n-- Question: Which cats?\n-- SQL:\n",
        "SELECT 'Which cats?'",
        "cats",
    )


@pytest.fixture(scope="module")
def real_data() -> Path:
    if not REAL_DATA.is_dir():
        pytest.skip(f"{REAL_DATA} is not there")
    return REAL_DATA


@pytest.mark.parametrize("name", NAMED_SETS)
def test_real_splits_do_not_overlap(real_data: Path, name: str) -> None:
    check_disjoint(name, real_data)


def test_real_mmlu_has_every_subject(real_data: Path) -> None:
    calibration, evaluation = both_splits("mmlu", real_data)
    assert len(evaluation.items) == 3529
    # 88 of the first three quarters are asked in the rest too.
    assert len(calibration.items) == 14042 - 3529 - 88
    groups = Counter(item.group for item in evaluation.items)
    assert len(groups) == 57
    assert {item.completion for item in calibration.items} == {" A", " B", " C", " D"}
    assert all(item.prompt.count("\nAnswer: ") >= 5 for item in evaluation.items)
