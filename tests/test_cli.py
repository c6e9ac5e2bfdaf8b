import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from time import perf_counter

import pytest
import torch
from typer.testing import CliRunner, Result

from tacq_vllm import __version__
from tacq_vllm.cli import app
from tacq_vllm.config import Recipe
from tacq_vllm.format.checkpoint import WEIGHTS_NAME, read_schema
from tacq_vllm.format.inspection import inspect_checkpoint
from tacq_vllm.format.validation import find_faults
from tests.builders import rewrite_tensors, truncate

TACQ = Path(sys.executable).parent / "tacq"


def tacq(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def assert_one_line(result: Result, reason: str) -> None:
    """Exit code 2, one line that says what is wrong, and nothing else."""
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == 2
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("tacq: ")
    assert reason in line


def test_help_is_instant() -> None:
    seconds = []
    for _ in range(3):
        start = perf_counter()
        result = subprocess.run(
            [TACQ, "--help"], capture_output=True, text=True, check=False
        )
        seconds.append(perf_counter() - start)

    # The fastest, for others may be at work on the machine.
    assert min(seconds) < 2
    assert result.returncode == 0
    for command in ("quantize", "inspect", "verify"):
        assert command in result.stdout


@pytest.mark.parametrize("command", ["quantize", "inspect", "verify"])
def test_help_of_commands(command: str) -> None:
    result = tacq(command, "--help")

    assert result.exit_code == 0
    assert "Usage" in result.stdout


def test_version() -> None:
    assert tacq("--version").stdout == f"{__version__}\n"


def test_inspect_as_text(tiny_checkpoint: Path) -> None:
    figures = inspect_checkpoint(tiny_checkpoint)

    result = tacq("inspect", tiny_checkpoint)

    assert result.exit_code == 0
    assert f"effective bits {figures.effective_bits:.4f}" in result.stdout
    assert f"paper's formula {figures.paper_bits:.4f}" in result.stdout
    assert "3 bits, a scale per 32 columns, bfloat16; 258 of 73,728" in result.stdout
    assert f"quantized linears {figures.linear_bytes:,} bytes" in result.stdout


def test_inspect_as_json(tiny_checkpoint: Path) -> None:
    result = tacq("inspect", tiny_checkpoint, "--json")

    assert result.exit_code == 0
    shown = json.loads(result.stdout)
    assert shown["bits"] == 3
    assert shown["outliers"] == 258
    assert len(shown["linears"]) == 14


def test_inspect_draws_a_picture(tiny_checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the picture needs the extra `plots`")

    result = tacq("inspect", tiny_checkpoint, "--plot", tmp_path / "kept.png")

    assert result.exit_code == 0
    assert (tmp_path / "kept.png").read_bytes().startswith(b"\x89PNG")


def test_verify_a_whole_checkpoint(tiny_checkpoint: Path) -> None:
    result = tacq("verify", tiny_checkpoint)

    assert result.exit_code == 0
    assert result.stdout == f"{tiny_checkpoint}: whole\n"


def test_verify_names_each_fault_in_a_line(checkpoint_copy: Path) -> None:
    names = [f"model.layers.{i}.mlp.up_proj.scales" for i in (0, 1)]
    rewrite_tensors(
        checkpoint_copy,
        lambda tensors: tensors.update(
            {name: tensors[name] * float("nan") for name in names}
        ),
    )

    result = tacq("verify", checkpoint_copy)

    assert result.exit_code == 1
    lines = result.stdout.splitlines()
    assert len(lines) == 2
    assert all(name in line for name, line in zip(names, lines, strict=True))


def test_verify_a_folder_that_does_not_exist(tmp_path: Path) -> None:
    result = tacq("verify", tmp_path / "nowhere")

    assert result.exit_code == 1
    assert "nowhere/config.json: the file is missing" in result.stdout


def test_quantize_end_to_end(tiny_model: Path, text_file: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    options = {
        "--recipe": "smollm2/demo",
        "--output": output,
        "--work-dir": tmp_path / "work",
        "--bits": 2,
        "--group-size": 32,
        "--outlier-ratio": 0.01,
        "--method": "tacq",
        "--saliency": "msg",
        "--num-samples": 3,
        "--seq-len": 16,
        "--seed": 4,
        "--device": "cpu",
    }
    arguments = [str(part) for option in options.items() for part in option]
    sources = ["--calibration", str(text_file), "--calibration", "self"]

    result = subprocess.run(
        [TACQ, "quantize", tiny_model, *arguments, *sources],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )

    assert result.returncode == 0, result.stderr
    assert find_faults(output) == []
    figures = inspect_checkpoint(output)
    assert result.stdout == (
        f"{output}: {figures.effective_bits:.3f} effective bits "
        f"({figures.paper_bits:.3f} by the paper's formula), "
        f"737 weights kept, {figures.checkpoint_bytes / 1e6:.1f} MB\n"
    )
    assert "quantization 14/14  model.layers.1.mlp.down_proj" in result.stderr
    recipe = Recipe.model_validate(read_schema(output).recipe)
    assert (recipe.bits, recipe.group_size, recipe.outliers.ratio) == (2, 32, 0.01)
    assert (recipe.method, recipe.outliers.saliency) == ("tacq", "msg")
    assert recipe.calibration.sources == (text_file.name, "self")
    assert recipe.calibration.num_samples == 3
    assert recipe.calibration.seq_len == 16
    assert recipe.calibration.seed == 4
    card = (output / "README.md").read_text()
    assert "tiny-llama, TaCQ 2 bits" in card


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--bits", "5"], "bits: Input should be 2, 3 or 4"),
        (["--group-size", "24"], "group_size 24: use -1 or a multiple of 16"),
        (["--group-size", "48"], "q_proj: group_size 48 does not divide its 64"),
        (["--recipe", "nobody/nothing"], "no recipe 'nobody/nothing'"),
        (["--num-samples", "0"], "calibration.num_samples: "),
        (["--outlier-ratio", "2"], "outliers.ratio: "),
        (["--calibration", "nowhere.txt"], "'nowhere.txt': no such file"),
        (["--seq-len", "100000"], "tokens, fewer than one window of 100000"),
    ],
)
def test_bad_options(
    tiny_model: Path, text_file: Path, tmp_path: Path, options: list[str], reason: str
) -> None:
    arguments = ["quantize", tiny_model, "--output", tmp_path / "out", *options]
    if "--calibration" not in options:
        arguments += ["--calibration", text_file]

    result = tacq(*arguments)

    assert_one_line(result, reason)
    assert not list(tmp_path.iterdir())


def test_an_output_that_exists(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("data")

    result = tacq("quantize", tiny_model, "--output", tmp_path)

    assert_one_line(result, "exists already; choose another --output")
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


def test_an_output_under_a_file(
    tiny_model: Path, text_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("data")

    output = tmp_path / "file" / "out"
    result = tacq(
        "quantize", tiny_model, "--output", output, "--calibration", text_file
    )

    assert_one_line(result, "Not a directory")


def test_a_model_that_does_not_exist(tmp_path: Path) -> None:
    result = tacq("quantize", tmp_path / "nowhere", "--output", tmp_path / "out")

    assert_one_line(result, "nowhere: cannot be loaded")


def test_a_model_that_is_damaged(tiny_model: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    truncate(model / WEIGHTS_NAME)

    result = tacq("quantize", model, "--output", tmp_path / "out")

    assert_one_line(result, "cannot be loaded")


def test_an_interrupt(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tacq_vllm.quantize.pipeline.quantize_model", interrupt)

    result = tacq("quantize", tiny_model, "--output", tmp_path / "out")

    assert_one_line(result, "interrupted; nothing was written")


def test_a_model_that_is_quantized(tiny_checkpoint: Path, tmp_path: Path) -> None:
    result = tacq("quantize", tiny_checkpoint, "--output", tmp_path / "out")

    assert_one_line(result, "already quantized; give the 16-bit model")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there(tiny_model: Path, tmp_path: Path) -> None:
    result = tacq(
        "quantize", tiny_model, "--output", tmp_path / "out", "--device", "cuda"
    )

    assert_one_line(result, "PyTorch sees no CUDA device")


def test_inspect_what_is_no_checkpoint(tiny_model: Path, tmp_path: Path) -> None:
    assert_one_line(tacq("inspect", tiny_model), "not a TaCQ checkpoint")
    assert_one_line(tacq("inspect", tmp_path), "config.json: the file is missing")


def test_inspect_a_damaged_checkpoint(checkpoint_copy: Path) -> None:
    truncate(checkpoint_copy / WEIGHTS_NAME)

    assert_one_line(tacq("inspect", checkpoint_copy), f"{WEIGHTS_NAME}: truncated")


@pytest.mark.parametrize(
    ("name", "reason"),
    [("nowhere/kept.png", "No such file"), ("kept.xyz", "Format 'xyz' is not")],
)
def test_a_picture_that_cannot_be_written(
    tiny_checkpoint: Path, tmp_path: Path, name: str, reason: str
) -> None:
    pytest.importorskip("matplotlib", reason="the picture needs the extra `plots`")

    result = tacq("inspect", tiny_checkpoint, "--plot", tmp_path / name)

    assert_one_line(result, reason)


def test_an_extra_that_is_not_installed(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)

    result = tacq("inspect", tiny_checkpoint, "--plot", tmp_path / "kept.png")

    assert_one_line(result, "pip install 'tacq-vllm[")
