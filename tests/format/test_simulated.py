import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from tacq_vllm.cli import app
from tacq_vllm.format.checkpoint import CONFIG_NAME, read_any_schema
from tacq_vllm.format.inspection import inspect_checkpoint
from tacq_vllm.format.schema import FormatError, QuantizationSchema
from tacq_vllm.format.simulated import SIMULATED_KEY
from tacq_vllm.format.validation import find_faults
from tests.builders import quantize_arguments, remove, replace, rewrite_tensors

NAME = "model.layers.0.self_attn.q_proj"
BLOCK: dict[str, Any] = {
    "method": "spqr",
    "bits": 2,
    "group_size": 16,
    "dtype": "bfloat16",
    "effective_bits": 3.5,
    "linears": {
        NAME: {
            "out_features": 64,
            "in_features": 64,
            "outliers": 7,
            "stored_bytes": 64 * 64 * 7 // 16,
        }
    },
    "recipe": {"method": "spqr"},
}

Simulated = Callable[..., Path]


@pytest.fixture
def simulated(tiny_model: Path, tmp_path: Path) -> Simulated:
    """Make a folder whose block says that one of its linears was quantized."""

    def make(**fields: Any) -> Path:
        folder = Path(shutil.copytree(tiny_model, tmp_path / "simulated"))
        config = json.loads((folder / CONFIG_NAME).read_text())
        config[SIMULATED_KEY] = BLOCK | fields
        (folder / CONFIG_NAME).write_text(json.dumps(config))
        return folder

    return make


def tacq(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_figures(simulated: Simulated) -> None:
    figures = inspect_checkpoint(simulated())

    assert figures.simulated == "spqr"
    assert (figures.bits, figures.group_size, figures.dtype) == (2, 16, "bfloat16")
    assert (figures.weights, figures.outliers) == (4096, 7)
    assert figures.effective_bits == 3.5
    assert figures.paper_bits is None
    assert figures.tensor_parallel_sizes is None
    assert figures.checkpoint_bytes > 2 * 4096


def test_inspect_says_that_it_is_simulated(simulated: Simulated) -> None:
    folder = simulated()

    text, as_json = tacq("inspect", folder), tacq("inspect", folder, "--json")

    assert text.exit_code == 0
    assert "2 bits, a scale per 16 columns, bfloat16; 7 of 4,096" in text.stdout
    assert "simulated: the weights that spqr gives, in 16 bits" in text.stdout
    assert "effective bits 3.5000, if all its parts were packed" in text.stdout
    shown = json.loads(as_json.stdout)
    assert (shown["simulated"], shown["effective_bits"]) == ("spqr", 3.5)


def test_verify_refuses_it(simulated: Simulated) -> None:
    folder = simulated()

    result = tacq("verify", folder)

    assert result.exit_code == 1
    (line,) = result.stdout.splitlines()
    assert line == (
        f"{folder}: a simulated checkpoint (spqr): its weights are in 16 bits, with "
        "nothing packed in it; only `tacq inspect` knows it"
    )
    assert find_faults(folder) == [line]


@pytest.mark.parametrize("command", ["plot", "push", "export", "quantize"])
def test_nothing_else_takes_it(
    simulated: Simulated, tmp_path: Path, command: str
) -> None:
    folder, output = simulated(), tmp_path / "out"
    arguments: dict[str, list[str | Path]] = {
        "plot": ["inspect", folder, "--plot", tmp_path / "kept.png"],
        "push": ["push", folder, "user/name", "--dry-run"],
        "export": ["export", folder, "--to", "dequantized", "--output", output],
        "quantize": [*quantize_arguments(folder, output)],
    }

    result = tacq(*arguments[command])

    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert "simulated" in line if command != "quantize" else "already quantized" in line
    assert not output.exists()
    assert not (tmp_path / "kept.png").exists()


def linear(**fields: Any) -> dict[str, Any]:
    return {NAME: BLOCK["linears"][NAME] | fields}


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"effective_bits": 3.0}, "effective_bits: not those of the linears"),
        ({"effective_bits": float("nan")}, "effective_bits"),
        ({"linears": {}}, "linears: Dictionary should have at least 1 item"),
        ({"linears": linear(stored_bytes=10**400)}, "stored_bytes: "),
        ({"linears": linear(in_features=0)}, "in_features: "),
        ({"linears": linear(out_features=64.0)}, "out_features: "),
        ({"linears": linear(outliers=-1)}, "outliers: "),
        ({"surprise": 1}, "surprise: Extra inputs are not permitted"),
        ({"dtype": "float32"}, "dtype: "),
        ({"group_size": -2}, "group_size: "),
    ],
)
def test_a_block_that_contradicts_itself(
    simulated: Simulated, fields: dict[str, Any], reason: str
) -> None:
    with pytest.raises(FormatError, match=rf"^tacq_simulated: .*{reason}") as caught:
        inspect_checkpoint(simulated(**fields))
    assert "\n" not in str(caught.value)


def test_a_block_that_is_no_mapping(simulated: Simulated) -> None:
    folder = simulated()
    config = json.loads((folder / CONFIG_NAME).read_text()) | {SIMULATED_KEY: [1]}
    (folder / CONFIG_NAME).write_text(json.dumps(config))

    assert find_faults(folder) != []
    with pytest.raises(FormatError, match="tacq_simulated"):
        inspect_checkpoint(folder)


def test_weights_that_are_not_those_of_the_block(simulated: Simulated) -> None:
    folder = simulated()
    rewrite_tensors(folder, replace(f"{NAME}.weight", lambda W: W[:32].clone()))

    with pytest.raises(FormatError, match=rf"{NAME}\.weight: not \[64, 64\]"):
        inspect_checkpoint(folder)
    rewrite_tensors(folder, remove(f"{NAME}.weight"))
    with pytest.raises(FormatError, match=rf"{NAME}\.weight: the tensor is missing"):
        inspect_checkpoint(folder)


def test_a_packed_checkpoint_is_not_simulated(tiny_checkpoint: Path) -> None:
    schema = read_any_schema(tiny_checkpoint)

    assert isinstance(schema, QuantizationSchema)
    assert inspect_checkpoint(tiny_checkpoint).simulated is None
    assert schema.torch_dtype == torch.bfloat16
