import json
import os
import shutil
import subprocess
import sys
from io import StringIO
from pathlib import Path
from time import perf_counter

import pytest
import torch
from rich.console import Console
from rich.progress import Progress
from typer.testing import CliRunner, Result

from tacq_vllm import __version__
from tacq_vllm.cli import app
from tacq_vllm.config import Recipe
from tacq_vllm.format.checkpoint import WEIGHTS_NAME, read_schema
from tacq_vllm.format.inspection import inspect_checkpoint
from tacq_vllm.format.validation import find_faults
from tacq_vllm.quantize.progress import Progress as RunProgress
from tacq_vllm.terminal import RichListener
from tests.builders import (
    quantize_arguments,
    rewrite_schema,
    rewrite_tensors,
    truncate,
)
from tests.conftest import make_chat_tokenizer
from tests.convert.sources import save_gptq

TACQ = Path(sys.executable).parent / "tacq"
COMMANDS = [
    "quantize",
    "recover",
    "evaluate",
    "compare",
    "inspect",
    "verify",
    "push",
    "doctor",
    "import",
    "export",
]


def tacq(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def chat_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a chat template."""
    folder = tmp_path_factory.mktemp("chat") / "tiny-chat"
    shutil.copytree(tiny_model, folder)
    make_chat_tokenizer().save_pretrained(folder)
    return folder


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
    for command in COMMANDS:
        assert command in result.stdout


@pytest.mark.parametrize("command", COMMANDS)
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
    assert result.stdout.endswith("tensor-parallel sizes: 1\n")


def test_inspect_as_json(tiny_checkpoint: Path) -> None:
    result = tacq("inspect", tiny_checkpoint, "--json")

    assert result.exit_code == 0
    shown = json.loads(result.stdout)
    assert shown["bits"] == 3
    assert shown["outliers"] == 258
    assert len(shown["linears"]) == 14
    assert shown["tensor_parallel_sizes"] == [1]


@pytest.mark.parametrize(("sizes", "text"), [(None, "not stated"), ([], "none")])
def test_inspect_where_no_parallel_size_is_stated(
    checkpoint_copy: Path, sizes: list[int] | None, text: str
) -> None:
    rewrite_schema(checkpoint_copy, tensor_parallel_sizes=sizes)

    result = tacq("inspect", checkpoint_copy)

    assert result.stdout.endswith(f"tensor-parallel sizes: {text}\n")


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


def test_a_simulated_checkpoint_is_called_so(
    tiny_model: Path, text_file: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    arguments = quantize_arguments(tiny_model, output, text_file, method="spqr")

    result = tacq(*arguments)

    assert result.exit_code == 0, result.output
    figures = inspect_checkpoint(output)
    assert result.stdout.startswith(
        f"{output}: {figures.effective_bits:.3f} effective bits (simulated spqr, "
    )


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
    assert (tmp_path / "work").is_dir()
    assert {path.name for path in tmp_path.iterdir()} == {"out", "work"}
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
        (["--method", "fineq"], "bits 3: fineq has codes of 2"),
        (["--group-size", "48"], "q_proj: group_size 48 does not divide its 64"),
        (["--recipe", "nobody/nothing"], "no recipe 'nobody/nothing'"),
        (["--num-samples", "0"], "calibration.num_samples: "),
        (["--outlier-ratio", "2"], "outliers.ratio: "),
        (["--calibration", "nowhere.txt"], "nowhere.txt: no such file"),
        (["--calibration", "table.csv"], "'table.csv': neither `self`, nor one of"),
        (
            ["--calibration", "gsm8k", "--data-root", "nowhere"],
            "nowhere/gsm8k/train.jsonl: no such file",
        ),
        (["--calibration", "self", "--seq-len", "2"], "seq_len 2 leaves no room"),
    ],
)
def test_bad_options(
    chat_model: Path, text_file: Path, tmp_path: Path, options: list[str], reason: str
) -> None:
    arguments = ["quantize", chat_model, "--output", tmp_path / "out", *options]
    if "--calibration" not in options:
        arguments += ["--calibration", text_file]

    result = tacq(*arguments)

    assert_one_line(result, reason)
    # Nothing is there but where the next run would go on.
    assert {path.name for path in tmp_path.iterdir()} <= {".out.work"}


def test_a_named_set_in_a_folder(
    tiny_model: Path, data_root: Path, tmp_path: Path
) -> None:
    arguments = quantize_arguments(tiny_model, tmp_path / "out", "gsm8k", "wikitext2")

    result = tacq(*arguments, "--data-root", data_root, "--method", "gptq")

    assert result.exit_code == 0, result.stderr
    recipe = Recipe.model_validate(read_schema(tmp_path / "out").recipe)
    assert recipe.calibration.sources == ("gsm8k", "wikitext2")
    assert str(data_root) not in (tmp_path / "out" / "config.json").read_text()


def test_the_hidden_work_folder_goes(
    tiny_model: Path, text_file: Path, tmp_path: Path
) -> None:
    result = tacq(*quantize_arguments(tiny_model, tmp_path / "out", text_file))

    assert result.exit_code == 0, result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_is_found_in_a_work_folder_is_told(
    tiny_model: Path, text_file: Path, tmp_path: Path
) -> None:
    def quantize(name: str, *options: str) -> list[str]:
        arguments = quantize_arguments(tiny_model, tmp_path / name, text_file)
        result = tacq(*arguments, "--work-dir", tmp_path / "work", *options)
        assert result.exit_code == 0, result.stderr
        return result.stderr.splitlines()

    first = quantize("first")
    other = quantize("other", "--bits", "2")

    assert not any("taken" in line or "anew" in line for line in first)
    assert [line for line in other if "taken" in line or "anew" in line] == [
        "calibration: taken from the work folder",
        "gptq: computed anew: bits was 3, is 2",
        "gradients: taken from the work folder",
        "gptq: computed anew: bits was 3, is 2; outliers changed",
    ]
    assert sum(line.endswith(" steps") for line in other) == 3


def test_a_source_that_runs_out_is_told(tiny_model: Path, tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("the old river follows a garden again .")

    result = tacq(*quantize_arguments(tiny_model, tmp_path / "out", text))

    assert result.exit_code == 0, result.stderr
    assert "short.txt: 8 tokens, fewer than the 64 asked for" in result.stderr


def test_notes_and_phases_on_a_terminal() -> None:
    shown = StringIO()
    console = Console(file=shown, force_terminal=True, width=120)

    with Progress(*Progress.get_default_columns(), console=console) as bars:
        progress = RunProgress(RichListener(bars))
        progress.note("gradients: [taken] from the work folder")
        with progress.phase("quantization", 14) as phase:
            phase.advance(14, "model.layers.0")

    assert "gradients: [taken] from the work folder" in shown.getvalue()
    assert "quantization" in shown.getvalue()
    assert "100%" in shown.getvalue()


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


def test_a_model_that_is_damaged(model_copy: Path, tmp_path: Path) -> None:
    truncate(model_copy / WEIGHTS_NAME)

    result = tacq("quantize", model_copy, "--output", tmp_path / "out")

    assert_one_line(result, "cannot be loaded")


def test_an_interrupt(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tacq_vllm.quantize.pipeline.quantize_model", interrupt)

    result = tacq("quantize", tiny_model, "--output", tmp_path / "out")

    assert result.exit_code == 130
    (line,) = result.stderr.splitlines()
    assert line == "tacq: interrupted; the same command finishes what this one began"


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


def test_export(tiny_checkpoint: Path, tmp_path: Path) -> None:
    arguments = ["export", tiny_checkpoint, "--to", "dequantized", "--output"]

    result = tacq(*arguments, tmp_path / "out")

    assert result.exit_code == 0, result.stderr
    assert result.stdout == f"{tmp_path / 'out'}: dequantized\n"
    assert (tmp_path / "out" / WEIGHTS_NAME).is_file()
    assert_one_line(tacq(*arguments, tmp_path / "out"), "choose another --output")


def test_export_what_is_no_checkpoint(tiny_model: Path, tmp_path: Path) -> None:
    result = tacq(
        "export", tiny_model, "--to", "dequantized", "--output", tmp_path / "out"
    )

    assert_one_line(result, "not a TaCQ checkpoint")


def test_every_command_knows_clusters(tiny_model: Path, tmp_path: Path) -> None:
    output, dense = tmp_path / "out", tmp_path / "dense"
    clusters = {"method": "fineq", "bits": 2, "group_size": -1}

    result = tacq(*quantize_arguments(tiny_model, output, **clusters))

    assert result.exit_code == 0, result.output
    assert "(2.333 by the paper's formula), 0 weights kept" in result.stdout
    text = tacq("inspect", output).stdout
    assert "2.33 bits, a scale per row, bfloat16" in text
    figures = json.loads(tacq("inspect", output, "--json").stdout)
    assert (figures["layout"], figures["bits"]) == ("clusters", 2)
    assert figures["code_bits"] == pytest.approx(7 / 3)
    assert tacq("verify", output).exit_code == 0
    result = tacq("export", output, "--to", "dequantized", "--output", dense)
    assert result.exit_code == 0, result.output
    assert "(2.33 bits)" in (dense / "README.md").read_text()


def test_import(tiny_model: Path, tmp_path: Path) -> None:
    save_gptq(tiny_model, tmp_path / "gptq", 4, 32, sym=True, version=1)
    arguments = ["import", tmp_path / "gptq", "--output", tmp_path / "out"]

    result = tacq(*arguments, "--base", tiny_model, "--outlier-ratio", "0.001")

    assert result.exit_code == 0, result.stderr
    assert result.stdout == f"{tmp_path / 'out'}: imported\n"
    assert sum(read_schema(tmp_path / "out").circuits["default"].values()) == 73
    assert_one_line(tacq(*arguments), "choose another --output")


def test_import_what_is_not_quantized(tiny_model: Path, tmp_path: Path) -> None:
    result = tacq("import", tiny_model, "--output", tmp_path / "out")

    assert_one_line(result, "quant_method is None; gptq and compressed-tensors can be")


def test_import_what_does_not_exist(tmp_path: Path) -> None:
    result = tacq("import", tmp_path / "nowhere", "--output", tmp_path / "out")

    assert_one_line(result, "nowhere: cannot be loaded")
