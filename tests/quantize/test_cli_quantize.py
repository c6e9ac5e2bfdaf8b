"""`tacq quantize`, on tiny models."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from tacq_vllm import cli_show
from tacq_vllm.config import Recipe
from tacq_vllm.format.checkpoint import WEIGHTS_NAME, read_schema
from tacq_vllm.format.inspection import inspect_checkpoint
from tacq_vllm.format.validation import find_faults
from tacq_vllm.quantize.lock import locked_folder
from tests.builders import quantize_arguments, truncate
from tests.conftest import make_chat_tokenizer
from tests.test_cli import TACQ, assert_one_line, tacq


@pytest.fixture(scope="module")
def chat_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a chat template."""
    folder = tmp_path_factory.mktemp("chat") / "tiny-chat"
    shutil.copytree(tiny_model, folder)
    make_chat_tokenizer().save_pretrained(folder)
    return folder


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
        (["--bits", "5"], "options: --bits: Input should be 2, 3 or 4"),
        (["--group-size", "24"], "group_size 24: use -1 or a multiple of 16"),
        (["--method", "fineq"], "bits 3: fineq has codes of 2"),
        (["--method", "rtn", "--saliency", "qal"], "method rtn keeps no weights by"),
        (["--method", "gptq", "--outlier-ratio", "0.01"], "method gptq keeps no"),
        (["--group-size", "48"], "q_proj: group_size 48 does not divide its 64"),
        (["--recipe", "nobody/nothing"], "no recipe 'nobody/nothing'"),
        (["--num-samples", "0"], "options: --num-samples: "),
        (["--outlier-ratio", "2"], "options: --outlier-ratio: "),
        (["--calibration", "nowhere.txt"], "nowhere.txt: no such file"),
        (["--calibration", "table.csv"], "'table.csv': neither `self`, nor one of"),
        (
            ["--calibration", "gsm8k", "--data-root", "nowhere"],
            "nowhere/gsm8k/train.jsonl: no such file",
        ),
        (["--calibration", "self", "--seq-len", "2"], "seq_len 2 leaves no room"),
        (["--calibration", "self", "--seq-len", "129"], "more than the model's 128"),
        (["--seq-len", "129"], "windows of 129 tokens, more than the model's 128"),
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
    assert not list(tmp_path.iterdir())


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


def test_the_hidden_work_folder_goes_when_nobody_reads_the_result(
    tiny_model: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint is whole: the same command would not go on."""

    def stop(folder: Path) -> None:
        raise BrokenPipeError

    monkeypatch.setattr(cli_show, "print_summary", stop)

    tacq(*quantize_arguments(tiny_model, tmp_path / "out", text_file))

    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_same_command_twice_at_once(
    tiny_model: Path, text_file: Path, tmp_path: Path
) -> None:
    command = quantize_arguments(tiny_model, tmp_path / "out", text_file)

    with locked_folder(tmp_path / ".out.work"):
        result = tacq(*command)

    assert_one_line(result, ".out.work: another process is at work there; wait")
    assert tacq(*command).exit_code == 0
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

    assert_one_line(result, f"{tmp_path / 'file'} is a file; choose another --output")


def test_a_model_that_does_not_exist(tmp_path: Path) -> None:
    result = tacq("quantize", tmp_path / "nowhere", "--output", tmp_path / "out")

    assert_one_line(result, "nowhere: no such folder here, and the Hub")


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
