"""The commands that show and check a checkpoint."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from torch import Tensor

from tacq_vllm.format.checkpoint import WEIGHTS_NAME
from tacq_vllm.format.inspection import inspect_checkpoint
from tacq_vllm.format.json_object import read_json
from tests.builders import rewrite_schema, rewrite_tensors, truncate
from tests.test_cli import TACQ, assert_one_line, tacq


def test_inspect_as_text(tiny_checkpoint: Path) -> None:
    figures = inspect_checkpoint(tiny_checkpoint)

    result = tacq("inspect", tiny_checkpoint)

    assert result.exit_code == 0
    for linear in figures.linears:
        assert f" {100 * linear.outliers / linear.weights:.3f} " in result.stdout
    assert f"effective bits {figures.effective_bits:.4f}" in result.stdout
    assert f"paper's formula {figures.paper_bits:.4f}" in result.stdout
    assert "3 bits, a scale per 32 columns, bfloat16; 258 of 73,728" in result.stdout
    assert f"quantized linears {figures.linear_bytes:,} bytes" in result.stdout
    assert result.stdout.endswith("tensor-parallel sizes: 1\n")


@pytest.mark.parametrize("command", ["inspect", "doctor"])
def test_what_tensors_are_called_is_not_sent_to_the_terminal(
    command: str, checkpoint_copy: Path
) -> None:
    """Nor is it markup, nor a number that is too long."""
    config = read_json(checkpoint_copy / "config.json")
    block = config["quantization_config"]
    new = dict(
        zip(
            block["linears"],
            ["m.\x1b[31mred\ntacq: fine", "m.[/nope]", f"m.{'9' * 5000}", "m.²"],
            strict=False,
        )
    )
    for names in (block["linears"], block["circuits"]["default"]):
        for old, name in new.items():
            names[name] = names.pop(old)
    (checkpoint_copy / "config.json").write_text(json.dumps(config))

    def rename(tensors: dict[str, Tensor]) -> None:
        for tensor in list(tensors):
            linear, _, suffix = tensor.rpartition(".")
            if linear in new:
                tensors[f"{new[linear]}.{suffix}"] = tensors.pop(tensor)

    rewrite_tensors(checkpoint_copy, rename)

    result = tacq(command, checkpoint_copy)

    assert result.exit_code == 0, result.output
    assert "\x1b" not in result.output
    assert "\ntacq:" not in result.output


def test_inspect_as_json(tiny_checkpoint: Path) -> None:
    result = tacq("inspect", tiny_checkpoint, "--json")

    assert result.exit_code == 0
    shown = json.loads(result.stdout)
    assert shown["bits"] == 3
    assert shown["outliers"] == 258
    assert len(shown["linears"]) == 14
    assert shown["tensor_parallel_sizes"] == [1]


def test_a_reader_that_has_seen_enough(tiny_checkpoint: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [TACQ, "inspect", tiny_checkpoint, "--json"]

    result = subprocess.run(
        command, stdout=writing, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(writing)

    assert result.returncode == 1
    assert result.stderr == ""


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
    assert "nowhere: there is no such folder" in result.stdout


def test_inspect_what_is_no_checkpoint(tiny_model: Path, tmp_path: Path) -> None:
    assert_one_line(tacq("inspect", tiny_model), "not a TaCQ checkpoint")
    assert_one_line(tacq("inspect", tmp_path), "config.json: the file is missing")
    assert_one_line(tacq("inspect", tmp_path / "nowhere"), "nowhere: there is no such")


def test_inspect_a_damaged_checkpoint(checkpoint_copy: Path) -> None:
    truncate(checkpoint_copy / WEIGHTS_NAME)

    assert_one_line(tacq("inspect", checkpoint_copy), f"{WEIGHTS_NAME}: truncated")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("nowhere/kept.png", "kept.png: there is no such folder"),
        ("kept.xyz", "Format 'xyz' is not"),
    ],
)
def test_a_picture_that_cannot_be_written(
    tiny_checkpoint: Path, tmp_path: Path, name: str, reason: str
) -> None:
    pytest.importorskip("matplotlib", reason="the picture needs the extra `plots`")

    result = tacq("inspect", tiny_checkpoint, "--plot", tmp_path / name)

    assert_one_line(result, reason)
