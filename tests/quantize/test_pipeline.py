import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tacq_vllm.config import Recipe, override_recipe
from tacq_vllm.format.checkpoint import (
    INDEX_NAME,
    WEIGHTS_NAME,
    CheckpointReader,
    read_schema,
)
from tacq_vllm.format.schema import QuantizationSchema
from tacq_vllm.format.validation import find_faults, load_linear
from tacq_vllm.kernels.reference import dequantize
from tacq_vllm.quantize import pipeline
from tacq_vllm.quantize.errors import QuantizeError
from tacq_vllm.quantize.model import BaseModel, load_base_model
from tacq_vllm.quantize.pipeline import REPORT_NAME, TIMINGS_NAME, quantize_model
from tacq_vllm.quantize.progress import Progress
from tacq_vllm.quantize.workdir import WorkDir
from tests.conftest import TinyLlama, run_pipeline

CPU = torch.device("cpu")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def quick(recipe: Recipe, **overrides: Any) -> Recipe:
    """A recipe changed in some fields, with as few samples as can be."""
    fields = {"calibration.num_samples": 2, "gptq.grid_steps": 4}
    return override_recipe(recipe, fields | overrides)


def folders_that_look_whole(parent: Path) -> list[Path]:
    return [
        path for path in parent.iterdir() if path.is_dir() and not find_faults(path)
    ]


def test_equal_runs_give_equal_bytes(
    tiny_model: Path, tiny_checkpoint: Path, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    base = load_base_model(str(tiny_model), CPU)

    run_pipeline(base, tiny_recipe, tmp_path / "tiny", tmp_path / "work")

    first, second = contents(tiny_checkpoint), contents(tmp_path / "tiny")
    assert first.pop(TIMINGS_NAME)
    assert second.pop(TIMINGS_NAME)
    assert first == second


def test_the_model_is_as_before(
    tiny_base: BaseModel, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    model = tiny_base.model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = model.config.to_dict()

    run_pipeline(tiny_base, quick(tiny_recipe), tmp_path / "out", tmp_path / "work")

    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not any(p.requires_grad for p in model.parameters())
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert model.config.to_dict() == config


def test_the_checkpoint_is_the_base_model_but_for_its_linears(
    tiny_model: Path, tiny_checkpoint: Path
) -> None:
    original = load_file(tiny_model / WEIGHTS_NAME)
    schema = read_schema(tiny_checkpoint)

    with CheckpointReader(tiny_checkpoint) as reader:
        for name, tensor in original.items():
            linear = name.removesuffix(".weight")
            if linear not in schema.linears:
                assert torch.equal(reader.load(name), tensor)
                continue
            W = tensor.float()
            weight = dequantize(load_linear(reader, schema, linear))
            # Three bits of a normal distribution.
            assert (weight - W).norm() < 0.35 * W.norm()


def test_report_and_recipe(
    tiny_base: BaseModel, tiny_checkpoint: Path, tiny_recipe: Recipe, text_file: Path
) -> None:
    schema = read_schema(tiny_checkpoint)
    lines = (tiny_checkpoint / REPORT_NAME).read_text().splitlines()
    reports = [json.loads(line) for line in lines]

    assert [report["name"] for report in reports] == list(tiny_base.linears())
    for report in reports:
        assert report["bits"] == 3
        assert report["group_size"] == 32
        assert report["outliers"] == schema.num_outliers(report["name"])
        assert 0 < report["error"] < 0.1
        assert report["damp_percent"] == 0.01
    stored = Recipe.model_validate(schema.recipe)
    assert stored.calibration.sources == (text_file.name,)
    assert stored.gptq == tiny_recipe.gptq
    assert str(text_file.parent) not in (tiny_checkpoint / "README.md").read_text()


def test_several_shards(
    tiny_base: BaseModel, tiny_checkpoint: Path, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    recipe = override_recipe(tiny_recipe, {"export.max_shard_bytes": 20_000})

    run_pipeline(tiny_base, recipe, tmp_path / "out", tmp_path / "work")

    assert find_faults(tmp_path / "out") == []
    assert (tmp_path / "out" / INDEX_NAME).is_file()
    whole = load_file(tiny_checkpoint / WEIGHTS_NAME)
    parts: dict[str, torch.Tensor] = {}
    for path in (tmp_path / "out").glob("*.safetensors"):
        parts |= load_file(path)
    assert parts.keys() == whole.keys()
    assert all(torch.equal(parts[name], whole[name]) for name in whole)


def test_plain_gptq_keeps_no_weights(
    tiny_base: BaseModel, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    recipe = quick(tiny_recipe, method="gptq", bits=2, group_size=-1)

    run_pipeline(tiny_base, recipe, tmp_path / "out", tmp_path / "work")

    assert find_faults(tmp_path / "out") == []
    schema = read_schema(tmp_path / "out")
    assert schema.paper_bits == 2.0
    assert set(schema.circuits["default"].values()) == {0}
    assert not (tmp_path / "work").exists()


def test_original_values_of_the_largest_weights(
    tiny_base: BaseModel, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    recipe = quick(
        tiny_recipe,
        **{
            "bits": 4,
            "outliers.saliency": "magnitude",
            "outliers.kept_value": "original",
            "outliers.ratio": 0.01,
        },
    )

    run_pipeline(tiny_base, recipe, tmp_path / "out", tmp_path / "work")

    schema = read_schema(tmp_path / "out")
    weights = {name: m.weight for name, m in tiny_base.linears().items()}
    magnitudes = torch.cat([W.abs().flatten() for W in weights.values()])
    budget = int(0.01 * magnitudes.numel())
    threshold = magnitudes.topk(budget).values[-1]
    assert sum(schema.circuits["default"].values()) == budget
    with CheckpointReader(tmp_path / "out") as reader:
        for name, W in weights.items():
            weight = dequantize(load_linear(reader, schema, name))
            largest = W.abs() > threshold
            assert torch.equal(weight[largest], W[largest])


@pytest.mark.parametrize("saliency", ["qal", "msg", "grad", "fisher"])
def test_every_score_spends_the_whole_budget(
    tiny_base: BaseModel, tiny_recipe: Recipe, tmp_path: Path, saliency: str
) -> None:
    recipe = quick(tiny_recipe, **{"outliers.saliency": saliency})

    run_pipeline(tiny_base, recipe, tmp_path / "out", tmp_path / "work")

    schema = read_schema(tmp_path / "out")
    kept = sum(schema.circuits["default"].values())
    assert kept == int(recipe.outliers.ratio * schema.num_weights)
    assert find_faults(tmp_path / "out") == []


def test_tied_embeddings_are_stored_once(
    tiny_llama: TinyLlama, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    model = tiny_llama(torch.float16, tie_word_embeddings=True)
    base = load_base_model(str(model), CPU)

    run_pipeline(
        base, quick(tiny_recipe, method="gptq"), tmp_path / "out", tmp_path / "work"
    )

    stored = load_file(tmp_path / "out" / WEIGHTS_NAME)
    assert "model.embed_tokens.weight" in stored
    assert "lm_head.weight" not in stored
    assert {t.dtype for t in stored.values()} == {torch.int32, torch.float16}


def test_an_output_that_exists_is_refused(
    tiny_base: BaseModel, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("data")

    with pytest.raises(QuantizeError, match="exists already"):
        run_pipeline(tiny_base, tiny_recipe, tmp_path / "out", tmp_path / "work")

    assert contents(tmp_path / "out") == {"precious": b"data"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_empty_output_is_used(
    tiny_base: BaseModel, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()

    recipe = quick(tiny_recipe, method="gptq")
    run_pipeline(tiny_base, recipe, tmp_path / "out", tmp_path / "work")

    assert find_faults(tmp_path / "out") == []


def test_a_group_size_that_does_not_fit_is_refused_by_name(
    tiny_base: BaseModel, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    recipe = override_recipe(tiny_recipe, {"group_size": 48})

    with pytest.raises(QuantizeError, match=r"q_proj: group_size 48 .* 64 input"):
        run_pipeline(tiny_base, recipe, tmp_path / "out", tmp_path / "work")

    assert not list(tmp_path.iterdir())


def test_a_failed_linear_is_named(
    tiny_base: BaseModel,
    tiny_recipe: Recipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise QuantizeError("the Hessian is singular")

    monkeypatch.setattr(pipeline, "quantize_matrix", fail)
    before = [linear.weight.clone() for linear in tiny_base.linears().values()]

    with pytest.raises(QuantizeError, match=r"q_proj, \S+k_proj, \S+v_proj: the Hess"):
        run_pipeline(tiny_base, tiny_recipe, tmp_path / "out", tmp_path / "work")

    assert not list(tmp_path.iterdir())
    after = [linear.weight for linear in tiny_base.linears().values()]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


class Interrupt:
    """A listener that stops the run at a step of a phase."""

    def __init__(self, phase: str, step: int) -> None:
        self._phase = phase
        self._left = step

    def phase_started(self, name: str, total: int) -> None: ...

    def phase_advanced(self, name: str, steps: int, detail: str) -> None:
        if name == self._phase:
            self._left -= 1
            if self._left == 0:
                raise KeyboardInterrupt

    def phase_finished(self, name: str, seconds: float) -> None: ...


@pytest.mark.parametrize(
    ("phase", "step"),
    [("plain quantization", 3), ("gradients", 1), ("quantization", 9)],
)
def test_an_interrupt_leaves_nothing_and_the_model_as_before(
    tiny_base: BaseModel, tiny_recipe: Recipe, tmp_path: Path, phase: str, step: int
) -> None:
    before = [linear.weight.clone() for linear in tiny_base.linears().values()]
    progress = Progress(Interrupt(phase, step))
    recipe = quick(tiny_recipe, **{"export.max_shard_bytes": 5000})

    with pytest.raises(KeyboardInterrupt):
        quantize_model(
            tiny_base,
            recipe,
            tmp_path / "out",
            WorkDir(tmp_path / "work"),
            progress,
            lambda folder, schema: None,
        )

    assert {path.name for path in tmp_path.iterdir()} == {"work"}
    after = [linear.weight for linear in tiny_base.linears().values()]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_a_failing_card_leaves_no_folder(
    tiny_base: BaseModel, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    def fail(folder: Path, schema: QuantizationSchema) -> None:
        # All weights are there, but nothing takes the folder for a checkpoint yet.
        assert schema.linears
        assert find_faults(folder) == [f"{folder / 'config.json'}: the file is missing"]
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        quantize_model(
            tiny_base,
            quick(tiny_recipe, method="gptq"),
            tmp_path / "out",
            WorkDir(tmp_path / "work"),
            Progress(),
            fail,
        )

    assert not list(tmp_path.iterdir())


def test_leftovers_of_a_killed_run_are_replaced(
    tiny_base: BaseModel, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    leftover = tmp_path / ".out.partial"
    leftover.mkdir()
    (leftover / "model-00001-of-00002.safetensors").write_bytes(b"old")

    recipe = quick(tiny_recipe, method="gptq")
    run_pipeline(tiny_base, recipe, tmp_path / "out", tmp_path / "work")

    assert find_faults(tmp_path / "out") == []
    assert not (tmp_path / "out" / "model-00001-of-00002.safetensors").exists()
    assert not leftover.exists()


KILLED_RUN = """
import os, signal, sys
from tacq_vllm import cli

def die(listener, phase, steps, detail):
    listener.steps = getattr(listener, "steps", 0) + (phase == sys.argv[1])
    if listener.steps == 5:
        os.kill(os.getpid(), signal.SIGKILL)

cli.LogListener.phase_advanced = die
cli.app(sys.argv[2:])
"""


@pytest.mark.parametrize("phase", ["gradients", "quantization"])
def test_a_killed_run_leaves_nothing_that_looks_whole(
    tiny_model: Path, text_file: Path, tmp_path: Path, phase: str
) -> None:
    output = tmp_path / "made" / "out"
    options = {
        "--output": output,
        "--work-dir": tmp_path / "work",
        "--calibration": text_file,
        "--num-samples": 6,
        "--seq-len": 32,
        "--group-size": 32,
    }
    arguments = [str(part) for option in options.items() for part in option]

    result = subprocess.run(
        [sys.executable, "-c", KILLED_RUN, phase, "quantize", tiny_model, *arguments],
        capture_output=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )

    assert result.returncode == -signal.SIGKILL, result.stderr
    assert [path.name for path in output.parent.iterdir()] == [".out.partial"]
    assert folders_that_look_whole(output.parent) == []


def run_python(code: str) -> None:
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


def test_quantizing_leaves_vllm_alone() -> None:
    run_python(
        "import sys, tacq_vllm.cli, tacq_vllm.hub, tacq_vllm.quantize.pipeline\n"
        "assert 'vllm' not in sys.modules"
    )


def test_importing_the_package_is_light() -> None:
    run_python(
        "import sys, tacq_vllm\n"
        "assert not {'torch', 'vllm', 'triton', 'numba'} & set(sys.modules)"
    )


def test_linears_outside_attention_and_mlp_are_refused(
    tiny_base: BaseModel, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    class Bare(nn.Module):
        def get_decoder(self) -> nn.Module:
            decoder = nn.Module()
            decoder.layers = nn.ModuleList()
            return decoder

    base = BaseModel("bare", Bare(), tiny_base.tokenizer, torch.bfloat16)

    with pytest.raises(QuantizeError, match="Bare: no linears"):
        run_pipeline(base, tiny_recipe, tmp_path / "out", tmp_path / "work")
