"""`tacq compare`, on the tiny model."""

import json
import shutil
from pathlib import Path

import pytest
from pydantic import TypeAdapter
from typer.testing import CliRunner, Result

from tacq_vllm.cli import app
from tacq_vllm.compare.rows import RESULTS_NAME, Row
from tacq_vllm.compare.run import ROWS_FOLDER, WORK_FOLDER, check_folder
from tacq_vllm.format.inspection import inspect_checkpoint
from tacq_vllm.quantize.lock import locked_folder
from tacq_vllm.scores import read_scores_file
from tests.builders import quantize_arguments
from tests.evaluate.conftest import make_data
from tests.test_cli import assert_one_line, tacq


def read_results(folder: Path) -> list[Row]:
    """All rows that a comparison has left."""
    content = (folder / RESULTS_NAME).read_bytes()
    return TypeAdapter(list[Row]).validate_json(content)


def arguments(model: Path, output: Path, root: Path, **options: object) -> list[str]:
    """A small comparison, on the command line."""
    usual = {
        "methods": "gptq,magnitude",
        "bits": "3",
        "group_size": "32",
        "calibration": "c4",
        "tasks": "wikitext2",
        "num_samples": 2,
        "seq_len": 32,
        "window": 64,
        "limit": 3,
        "option": "gptq.grid_steps=4",
        "device": "cpu",
        "data_root": root,
        "output": output,
    }
    command: list[object] = ["compare", model]
    for name, value in (usual | options).items():
        command += [f"--{name.replace('_', '-')}", value]
    return list(map(str, command))


def compare(model: Path, output: Path, root: Path, **options: object) -> Result:
    return CliRunner().invoke(app, arguments(model, output, root, **options))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def output(
    tiny_model: Path, root: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("compare") / "out"
    result = compare(tiny_model, folder, root)
    assert result.exit_code == 0, result.output
    assert result.stdout == (folder / "table.md").read_text()
    return folder


def test_a_row_for_each_model(output: Path) -> None:
    rows = read_results(output)

    methods = [row.cell.method if row.cell else "16-bit" for row in rows]
    assert sorted(methods) == ["16-bit", "gptq", "magnitude"]
    for row in rows:
        (score,) = row.scores
        assert (score.task, score.metric, score.limit) == ("wikitext2", "perplexity", 3)
        assert score.baseline is not None
        assert row.model == "tiny-llama"
        assert row.peak_bytes is not None
        # PyTorch alone takes more than that.
        assert 100e6 < row.peak_bytes < 100e9
        assert len(row.settings.pop("recipe")) == 8
        assert row.settings == {
            "backend": "hf",
            "dtype": "float32",
            "max_length": "4096",
            "data": "folder",
            "window": "64",
            "limit": "3",
            "calibration": "2 x 32",
        }
    by_method = dict(zip(methods, rows, strict=True))
    assert by_method["16-bit"].effective_bits == 16.0
    assert by_method["16-bit"].scores[0].recovery == pytest.approx(100.0)
    gptq, kept = by_method["gptq"], by_method["magnitude"]
    assert 3.0 < gptq.effective_bits < kept.effective_bits < 6.0
    for row in (gptq, kept):
        assert "quantization" in row.seconds
        assert not any("wikitext2" in phase for phase in row.seconds)
    table = (output / "table.md").read_text().splitlines()
    assert len(table) == 5
    assert table[0].endswith("| wikitext2 perplexity |")


def test_a_row_has_the_figures_of_its_model(
    tiny_model: Path, root: Path, output: Path, tmp_path: Path
) -> None:
    """Made and measured by the commands that do so one at a time."""
    made, scores = tmp_path / "made", tmp_path / "scores.json"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("gptq: {grid_steps: 4}\n")
    own = {"method": "gptq", "recipe": recipe, "data_root": root}
    measuring = ["--tasks", "wikitext2", "--data-root", root, "--window", 64]
    measuring += ["--limit", 3, "--dequantize", "--device", "cpu", "--json", scores]

    assert tacq(*quantize_arguments(tiny_model, made, "c4", **own)).exit_code == 0
    figures = []
    for model in (tiny_model, made):
        result = tacq("evaluate", model, *map(str, measuring))
        assert result.exit_code == 0, result.output
        (score,) = read_scores_file(scores).scores
        figures.append((score.value, score.stderr))

    rows = {row.cell and row.cell.method: row for row in read_results(output)}
    compared = [rows[method].scores[0] for method in (None, "gptq")]
    assert [(score.value, score.stderr) for score in compared] == figures
    assert compared[1].baseline == figures[0][0] != figures[1][0]
    bits = inspect_checkpoint(made).effective_bits
    assert rows["gptq"].effective_bits == bits


def test_pictures(output: Path) -> None:
    pytest.importorskip("matplotlib", reason="the pictures need the extra `plots`")

    assert (output / "bits.png").is_file()
    (outliers,) = (output / "outliers").iterdir()
    assert outliers.name.startswith("magnitude-w3-g32-c4-s0-")


def test_what_is_finished_is_not_repeated(
    tiny_model: Path, root: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise AssertionError("quantized again")

    before = (output / RESULTS_NAME).read_bytes()
    monkeypatch.setattr("tacq_vllm.compare.run.quantize_model", refuse)

    result = compare(tiny_model, output, root)

    assert result.exit_code == 0, result.output
    assert "measured before" in result.stderr
    assert (output / RESULTS_NAME).read_bytes() == before


def test_another_task_is_added_to_the_rows(
    tiny_model: Path, root: Path, output: Path
) -> None:
    result = compare(tiny_model, output, root, tasks="wikitext2,gsm8k-loss")

    assert result.exit_code == 0, result.output
    # The packed weights are where the first run left them.
    assert "quantization: 14 steps" not in result.stderr
    rows = read_results(output)
    assert len(rows) == 3
    assert all(row.tasks == ("wikitext2", "gsm8k-loss") for row in rows)
    assert all(len(row.scores) == 2 for row in rows)
    assert "gsm8k loss" in result.stdout.splitlines()[0]


@pytest.mark.parametrize(
    "changed", ["limit", "window", "max_length", "recipe", "model"]
)
def test_rows_measured_otherwise_are_not_in_the_table(
    tiny_model: Path, root: Path, output: Path, tmp_path: Path, changed: str
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("export: {dtype: float16}\n")
    values = {"limit": 2, "window": 32, "max_length": 100, "recipe": recipe}
    options = {changed: values[changed]} if changed in values else {}
    model = tiny_model
    if changed == "model":
        model = Path(shutil.copytree(tiny_model, tmp_path / "other"))

    result = compare(model, output, root, methods="gptq", **options)

    assert result.exit_code == 0, result.output
    assert len(result.stdout.splitlines()) == 4
    assert "measured in another way, are not in this table" in result.stderr


def test_another_source_of_the_same_name_is_refused(
    tiny_model: Path, root: Path, text_file: Path, tmp_path: Path
) -> None:
    """In the table they would be one setting."""
    output = tmp_path / "out"
    copies = [tmp_path / name for name in ("a.txt", "b/a.txt")]
    copies[1].parent.mkdir()
    for copy in copies:
        copy.write_text(text_file.read_text())
    first = compare(tiny_model, output, root, methods="gptq", calibration=copies[0])
    assert first.exit_code == 0, first.output

    result = compare(tiny_model, output, root, calibration=copies[1])

    (row,) = output.glob("rows/gptq-w3-g32-a.txt-s0-*.json")
    assert_one_line(result, f"{copies[1]}: {row} is of another source of that name")


def test_no_paths_are_told(tiny_model: Path, root: Path, output: Path) -> None:
    for path in output.glob("rows/*.json"):
        assert str(root) not in json.dumps(path.read_text())


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"methods": "magic"}, "magic: no such method"),
        ({"bits": "5"}, "options: --bits: Input should be"),
        ({"bits": "three"}, "--bits three: not whole numbers"),
        ({"tasks": "sudoku"}, "sudoku: no such task"),
        ({"seeds": "0,-1"}, "options: --seeds: Input should be"),
        ({"num_samples": "0"}, "options: --num-samples: Input should be"),
        ({"option": "nothing=1"}, "options: nothing: Extra inputs"),
        ({"data_root": "nowhere"}, "nowhere/wikitext2/test.txt: no such file"),
    ],
)
def test_bad_options(
    tiny_model: Path, root: Path, tmp_path: Path, options: dict[str, str], reason: str
) -> None:
    assert_one_line(compare(tiny_model, tmp_path / "out", root, **options), reason)


def test_groups_that_do_not_fit_are_refused_at_once(
    tiny_model: Path, root: Path, tmp_path: Path
) -> None:
    result = compare(tiny_model, tmp_path / "out", root, group_size="32,48")

    assert_one_line(result, "q_proj: group_size 48 does not divide its 64")
    assert not (tmp_path / "out" / "rows").exists()


def test_the_same_command_twice_at_once(
    tiny_model: Path, root: Path, tmp_path: Path
) -> None:
    with locked_folder(tmp_path / "out" / WORK_FOLDER):
        result = compare(tiny_model, tmp_path / "out", root)

    assert_one_line(result, f"{WORK_FOLDER}: another process is at work there; wait")
    assert not (tmp_path / "out" / ROWS_FOLDER).exists()


def test_a_folder_of_something_else(
    tiny_model: Path, root: Path, tmp_path: Path
) -> None:
    (tmp_path / "notes.txt").write_text("notes")

    for output, reason in (
        (tmp_path, "not empty, and no comparison"),
        (tmp_path / "notes.txt", "a file; choose another --output"),
    ):
        assert_one_line(compare(tiny_model, output, root), reason)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("name", [ROWS_FOLDER, WORK_FOLDER])
def test_a_folder_in_which_a_comparison_was_killed(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / "notes.txt").write_text("notes")

    check_folder(tmp_path)


def test_a_folder_that_cannot_be_made(
    tiny_model: Path, root: Path, tmp_path: Path
) -> None:
    (tmp_path / "notes.txt").write_text("notes")

    result = compare(tiny_model, tmp_path / "notes.txt" / "out", root)

    assert_one_line(result, "out: nothing can be written there; choose another")


def test_a_source_that_cannot_be_read_is_refused_at_once(
    tiny_model: Path, root: Path, tmp_path: Path
) -> None:
    result = compare(tiny_model, tmp_path / "out", root, calibration="c4,nowhere.txt")

    assert_one_line(result, "nowhere.txt: no such file")
    assert not (tmp_path / "out" / "rows").exists()


def test_a_source_that_no_method_reads(
    tiny_model: Path, root: Path, tmp_path: Path
) -> None:
    options = {"methods": "rtn", "calibration": "nowhere.txt", "seeds": "3,4"}

    result = compare(
        *(tiny_model, tmp_path / "out", root),
        **options,  # type: ignore[arg-type]
        work_dir=tmp_path / "elsewhere",
    )

    assert result.exit_code == 0, result.output
    rows = read_results(tmp_path / "out")
    assert {row.cell.seed for row in rows if row.cell} == {3, 4}
    assert not (tmp_path / "out" / WORK_FOLDER).exists()
    assert (tmp_path / "elsewhere").is_dir()


def test_a_simulated_model_has_a_row_and_no_map(
    tiny_model: Path, root: Path, tmp_path: Path
) -> None:
    result = compare(tiny_model, tmp_path / "out", root, methods="spqr")

    assert result.exit_code == 0, result.output
    (row,) = (row for row in read_results(tmp_path / "out") if row.cell)
    assert row.cell is not None
    assert (row.cell.method, row.cell.group_size) == ("spqr", 16)
    assert not (tmp_path / "out" / "outliers").exists()


def test_a_cell_that_cannot_be_made(
    tiny_model: Path, root: Path, tmp_path: Path
) -> None:
    # Longer than the model's positions: known when its windows are cut.
    result = compare(tiny_model, tmp_path / "out", root, seq_len=4096)

    assert result.exit_code == 2
    assert "choose a smaller --seq-len" in result.stderr.splitlines()[-1]
    # The 16-bit model's row is there for the next run.
    (row,) = (tmp_path / "out" / "rows").iterdir()
    assert row.name.startswith("16-bit-")
