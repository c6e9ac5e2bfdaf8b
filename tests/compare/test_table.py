from pathlib import Path

import pytest

from tacq_vllm.compare.matrix import Cell
from tacq_vllm.compare.rows import (
    RESULTS_NAME,
    Row,
    read_row,
    with_baselines,
    write_results,
    write_row,
)
from tacq_vllm.compare.table import group_rows, metrics_of, write_table
from tacq_vllm.scores import Score, ScoresError
from tests.compare.test_compare import read_results

BASE = Row(
    model="m",
    scores=(
        Score(task="c4", metric="perplexity", value=20.0),
        Score(task="mmlu", metric="accuracy", value=0.4, chance=0.25),
    ),
)


def row(
    method: str, perplexity: float, seed: int = 0, bits: int = 3, source: str = "c4"
) -> Row:
    cell = Cell(method=method, bits=bits, group_size=64, calibration=source, seed=seed)
    scores = (
        Score(task="c4", metric="perplexity", value=perplexity),
        Score(task="mmlu", metric="accuracy", value=0.3, chance=0.25),
    )
    return Row(model="m", cell=cell, effective_bits=bits + 0.5, scores=scores)


ROWS = with_baselines(
    [
        row("tacq", 30.0),
        row("gptq", 50.0, seed=0),
        BASE,
        row("gptq", 40.0, seed=1),
        row("gptq", 100.0, bits=2),
    ],
    BASE,
)


def test_a_line_a_setting() -> None:
    assert write_table(ROWS).splitlines() == [
        "| method | bits | group | calibrated on | options | effective bits | seeds "
        "| c4 perplexity | mmlu accuracy |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        "| 16-bit |  |  |  |  | 16 |  | 20 (100.0 %) | 0.4 (100.0 %) |",
        "| gptq | 2 | 64 | c4 |  | 2.500 | 0 | 100 (20.0 %) | 0.3 (75.0 %) |",
        "| tacq | 3 | 64 | c4 |  | 3.500 | 0 | 30 (66.7 %) | 0.3 (75.0 %) |",
        "| gptq | 3 | 64 | c4 |  | 3.500 | 0 1 | 45 ± 7.1 (45.0 %) "
        "| 0.3 ± 0 (75.0 %) |",
        "| by chance |  |  |  |  |  |  |  | 0.25 |",
    ]


def test_what_a_row_lacks_stays_empty() -> None:
    part = row("msg", 30.0).model_copy(update={"scores": ()})

    assert write_table([BASE, part]).splitlines()[3].endswith("| 0 |  |  |")


def test_groups_and_metrics() -> None:
    groups = group_rows(ROWS)

    assert [group.method for group in groups] == ["16-bit", "gptq", "tacq", "gptq"]
    assert groups[3].value(("c4", "perplexity")) == 45.0
    assert groups[3].value(("c4", "loss")) is None
    assert metrics_of(ROWS) == [("c4", "perplexity"), ("mmlu", "accuracy")]


def test_effective_bits_are_the_mean_over_the_seeds() -> None:
    other = row("gptq", 40.0, seed=1).model_copy(update={"effective_bits": 4.0})

    (group,) = group_rows([row("gptq", 50.0), other])

    assert group.effective_bits == 3.75


def test_a_row_gets_more_tasks() -> None:
    later = Row(
        model="m",
        scores=(
            Score(task="mmlu", metric="accuracy", value=0.5),
            Score(task="gsm8k", metric="loss", value=1.0),
        ),
        tasks=("mmlu", "gsm8k-loss"),
        versions={"lm-eval": "2", "torch": "3"},
    )
    earlier = BASE.model_copy(
        update={"tasks": ("c4",), "versions": {"torch": "3", "tacq-vllm": "1"}}
    )

    row = earlier.extended(later)

    values = [(score.task, score.value) for score in row.scores]
    assert values == [("c4", 20.0), ("mmlu", 0.5), ("gsm8k", 1.0)]
    assert row.tasks == ("c4", "mmlu", "gsm8k-loss")
    assert row.versions == {"tacq-vllm": "1", "torch": "3", "lm-eval": "2"}


def test_rows_on_disk(tmp_path: Path) -> None:
    write_row(tmp_path / "rows" / "a.json", ROWS[0])
    write_results(tmp_path / RESULTS_NAME, ROWS)

    assert read_row(tmp_path / "rows" / "a.json") == ROWS[0]
    assert read_row(tmp_path / "rows" / "b.json") is None
    assert read_results(tmp_path) == ROWS
    assert [path.name for path in (tmp_path / "rows").iterdir()] == ["a.json"]


def test_a_row_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{}")

    with pytest.raises(ScoresError, match=r"a\.json: model: Field required"):
        read_row(tmp_path / "a.json")


def test_pictures_of_what_there_is(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the pictures need the extra `plots`")
    from tacq_vllm.compare.pictures import draw_pictures

    few = draw_pictures([BASE, ROWS[0]], tmp_path)
    more = [row("msg", 28.0), row("tacq", 35.0, source="gsm8k")]
    many = draw_pictures([*ROWS, *with_baselines(more, BASE)], tmp_path)

    assert [path.name for path in few] == ["bits.png"]
    assert [path.stem for path in many] == ["bits", "saliency", "recovery"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in many)


def test_what_pictures_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", reason="the pictures need the extra `plots`")
    from matplotlib.figure import Figure

    from tacq_vllm.compare.pictures import draw_pictures

    def keep(figure: Figure, path: Path, **options: object) -> None:
        shown[path.name.split(".")[0]] = figure
        path.touch()

    shown: dict[str, Figure] = {}
    monkeypatch.setattr(Figure, "savefig", keep)
    cells = [
        row("tacq", 30.0),
        row("gptq", 50.0),
        row("msg", 25.0),
        row("gptq", 100.0, bits=2).model_copy(update={"effective_bits": 4.0}),
        row("tacq", 40.0, source="gsm8k"),
    ]

    draw_pictures(with_baselines([BASE, *cells], BASE), tmp_path)

    perplexity, accuracy = shown["bits"].axes
    assert (perplexity.get_title(), accuracy.get_title()) == (
        "c4 perplexity",
        "mmlu accuracy",
    )
    assert perplexity.get_yscale() == "log"
    lines = {
        line.get_label(): line.get_xydata().tolist() for line in perplexity.get_lines()
    }
    assert lines.pop("16-bit") == [[0.0, 20.0], [1.0, 20.0]]
    assert lines == {
        "gptq, c4": [[3.5, 50.0], [4.0, 100.0]],
        "tacq, c4": [[3.5, 30.0]],
        "msg, c4": [[3.5, 25.0]],
        "tacq, gsm8k": [[3.5, 40.0]],
    }

    (bars,) = shown["saliency"].axes
    heights = {
        part.get_label(): [bar.get_height() for bar in part] for part in bars.containers
    }
    assert heights == {"gptq": [50.0], "tacq": [30.0], "msg": [25.0]}

    (shares,) = shown["recovery"].axes
    assert shares.get_title() == "tacq, 3 bits, groups of 64"
    sources = [label.get_text() for label in shares.get_yticklabels()]
    assert [(*text.get_position(), text.get_text()) for text in shares.texts] == [
        (0, 0, "67 %"),
        (1, 0, "75 %"),
        (0, 1, "50 %"),
        (1, 1, "75 %"),
    ]
    assert sources == ["c4", "gsm8k"]
