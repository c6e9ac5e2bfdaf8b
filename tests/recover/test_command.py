"""`tacq recover`: options, recipes, and what is refused."""

from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from tacq_vllm import cli_recover
from tacq_vllm.cli import app
from tacq_vllm.config import RecipeError
from tacq_vllm.format.checkpoint import read_schema
from tacq_vllm.quantize.lock import locked_folder
from tacq_vllm.recover.budget import learning_rate
from tacq_vllm.recover.config import RecoverConfig, load_recover_config
from tests.hostile.good import CLUSTERED

SMALL = ["--num-samples", "4", "--seq-len", "16", "--steps", "1", "--device", "cpu"]


def recover(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["recover", *map(str, arguments)])


def assert_refused(result: Result, reason: str) -> None:
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith("tacq: ")
    assert reason in line


def test_options_override_the_recipe(
    tiny_checkpoint: Path, tiny_model: Path, text_file: Path, tmp_path: Path
):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("rank: 3\ntemperature: 2.0\nprecision: fp32\n")

    result = recover(
        *(tiny_checkpoint, "--base", tiny_model, "--output", tmp_path / "out"),
        *("--recipe", recipe, "--calibration", text_file, "--seed", "7"),
        *("--train", "lora", "--distill", "0.2", "--train-outliers", *SMALL),
    )

    assert result.exit_code == 0, result.output
    assert "effective bits" in result.stdout
    stored = read_schema(tmp_path / "out").recipe["recover"]
    assert (stored["rank"], stored["temperature"]) == (3, 2.0)
    assert (stored["seed"], stored["calibration"]["seed"]) == (7, 7)
    assert (stored["train"], stored["distill"]) == ("lora", 0.2)
    assert (stored["budget"], stored["budget_unit"]) == (1, "steps")
    # The stored choices are a recipe.
    del stored["base"]
    assert RecoverConfig.model_validate(stored).train_outliers


def test_the_same_command_twice_at_once(
    tiny_checkpoint: Path, text_file: Path, tmp_path: Path
):
    with locked_folder(tmp_path / ".out.work"):
        result = recover(
            *(tiny_checkpoint, "--output", tmp_path / "out"),
            *("--calibration", text_file, *SMALL),
        )

    assert_refused(result, ".out.work: another process is at work there; wait")


def test_the_hidden_work_folder_goes_when_nobody_reads_the_result(
    tiny_checkpoint: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    def stop(folder: Path) -> None:
        raise BrokenPipeError

    monkeypatch.setattr(cli_recover, "print_summary", stop)

    recover(
        *(tiny_checkpoint, "--output", tmp_path / "out"),
        *("--calibration", text_file, *SMALL),
    )

    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--steps", "3", "--minutes", "1"], "--steps and --minutes: give one"),
        (["--rank", "0"], "options: --rank: "),
        (["--distill", "0.4"], "--distill 0.4: needs --base, the 16-bit model"),
        (["--distill", "2", "--base", "none"], "options: --distill: "),
        (["--epochs", "inf"], "options: --epochs: Input should be a finite number"),
        (["--minutes", "-1"], "--minutes -1.0: give more than 0"),
        (["--steps", "0"], "--steps 0: give more than 0"),
        (["--recipe", "none.yaml"], "tacq: none.yaml: No such file or directory; give"),
        (["--base", "none.gguf"], "none.gguf: no such file"),
    ],
)
def test_bad_options_are_refused_in_one_line(
    tiny_checkpoint: Path, tmp_path: Path, options: list[str], reason: str
):
    result = recover(tiny_checkpoint, "--output", tmp_path / "out", *options)

    assert_refused(result, reason)
    assert not (tmp_path / "out").exists()


def test_text_that_is_not_there_is_refused(
    tiny_checkpoint: Path, tiny_model: Path, tmp_path: Path
):
    result = recover(
        *(tiny_checkpoint, "--base", tiny_model, "--output", tmp_path / "out"),
        *("--calibration", "none.txt", *SMALL),
    )

    assert_refused(result, "none.txt")


def test_what_is_no_checkpoint_is_refused(tiny_model: Path, tmp_path: Path):
    assert_refused(recover(tiny_model, "--output", tmp_path / "out"), "not a TaCQ")
    assert_refused(recover("nowhere", "--output", tmp_path / "out"), "nowhere")


def test_clusters_are_refused(tmp_path: Path):
    result = recover(CLUSTERED, "--output", tmp_path / "out")

    assert_refused(result, "codes in clusters cannot be trained")


def test_a_full_output_is_refused(tiny_checkpoint: Path):
    result = recover(tiny_checkpoint, "--output", tiny_checkpoint)

    assert_refused(result, "exists already")


def test_recipes_are_checked(tmp_path: Path):
    path = tmp_path / "recipe.yaml"
    path.write_text("learning_rate: 1\n")
    with pytest.raises(RecipeError, match="learning_rate"):
        load_recover_config(path)
    path.write_text("budget: 1.5\nbudget_unit: steps\n")
    with pytest.raises(RecipeError, match="not a whole number"):
        load_recover_config(path)


def test_every_choice_is_described():
    for name, field in RecoverConfig.model_fields.items():
        assert field.description or name == "calibration", name


def test_learning_rates_rise_and_fall():
    config = RecoverConfig(warmup=0.1, final_lr=0.2)
    rates = [learning_rate(share / 100, config) for share in range(101)]

    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[10] == 1.0
    assert rates[:11] == sorted(rates[:11])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[55] == pytest.approx(0.6)
    assert rates[-1] == pytest.approx(0.2)
