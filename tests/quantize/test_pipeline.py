import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    PretrainedConfig,
)

from tacq_vllm.config import Recipe, override_recipe
from tacq_vllm.format.checkpoint import (
    read_schema,
)
from tacq_vllm.format.validation import find_faults
from tacq_vllm.quantize.errors import QuantizeError
from tacq_vllm.quantize.export import TIMINGS_NAME
from tacq_vllm.quantize.model import BaseModel
from tests.builders import stored_weights
from tests.conftest import (
    VOCAB_SIZE,
    Recorder,
    assert_released,
    contents,
    open_model,
    quick,
    run_pipeline,
    save_random,
)


def test_equal_runs_give_equal_bytes(
    tiny_model: Path, tiny_checkpoint: Path, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    base = open_model(tiny_model, tmp_path / "work")

    run_pipeline(base, tiny_recipe, tmp_path / "tiny", tmp_path / "work")

    assert contents(tmp_path / "tiny") == contents(tiny_checkpoint)


def test_the_model_is_released(
    tiny_base: BaseModel, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    config = tiny_base.model.config.to_dict()

    run_pipeline(tiny_base, quick(tiny_recipe), tmp_path / "out", tmp_path / "work")

    assert_released(tiny_base)
    assert tiny_base.model.config.to_dict() == config


def test_phases(tiny_base: BaseModel, tiny_recipe: Recipe, tmp_path: Path) -> None:
    recorder = Recorder()

    run_pipeline(
        tiny_base, quick(tiny_recipe), tmp_path / "out", tmp_path / "work", recorder
    )

    phases = {
        "plain quantization": 14,
        "gradients": 4,
        "quantization": 14,
        "export": 1,
    }
    assert recorder.phases == phases
    assert list(recorder.phases) == list(phases)
    assert recorder.notes == []
    timings = json.loads((tmp_path / "out" / TIMINGS_NAME).read_text())
    assert list(timings["phases"]) == list(phases)[:-1]
    assert len(timings["blocks"]) == 2


def test_plain_gptq_keeps_no_weights(
    tiny_base: BaseModel, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    recipe = quick(tiny_recipe, method="gptq", bits=2, group_size=-1)
    recorder = Recorder()

    run_pipeline(tiny_base, recipe, tmp_path / "out", tmp_path / "work", recorder)

    assert find_faults(tmp_path / "out") == []
    schema = read_schema(tmp_path / "out")
    assert schema.paper_bits == 2.0
    assert set(schema.circuits["default"].values()) == {0}
    assert recorder.phases == {"quantization": 14, "export": 1}


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
    weights = {name: tiny_base.weight(name) for name in tiny_base.linears()}
    magnitudes = torch.cat([W.abs().flatten() for W in weights.values()])
    budget = int(0.01 * magnitudes.numel())
    threshold = magnitudes.topk(budget).values[-1]
    assert sum(schema.circuits["default"].values()) == budget
    stored = stored_weights(tmp_path / "out")
    for name, W in weights.items():
        largest = W.abs() > threshold
        assert torch.equal(stored[name][largest], W[largest])


def test_with_the_scope_of_a_linear_each_keeps_its_share(
    tiny_base: BaseModel, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    recipe = quick(
        tiny_recipe,
        **{
            "outliers.scope": "linear",
            "outliers.saliency": "magnitude",
            "outliers.ratio": 0.01,
        },
    )

    run_pipeline(tiny_base, recipe, tmp_path / "out", tmp_path / "work")

    schema = read_schema(tmp_path / "out")
    for name, weight in stored_weights(tmp_path / "out").items():
        W = tiny_base.weight(name)
        budget = int(0.01 * W.numel())
        assert schema.num_outliers(name) == budget
        largest = W.abs() > W.abs().flatten().topk(budget).values[-1]
        assert torch.equal(weight[largest], W[largest])


def test_with_the_scope_of_the_model_linears_compete(
    tiny_base: BaseModel, tiny_checkpoint: Path, tiny_recipe: Recipe
) -> None:
    schema = read_schema(tiny_checkpoint)

    kept = [schema.num_outliers(name) for name in tiny_base.linears()]
    assert sum(kept) == int(tiny_recipe.outliers.ratio * schema.num_weights)
    assert min(kept) == 0
    assert max(kept) > 4 * sum(kept) / len(kept)


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


def test_a_group_size_that_does_not_fit_is_refused_by_name(
    tiny_base: BaseModel, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    recipe = override_recipe(tiny_recipe, {"group_size": 48})

    with pytest.raises(QuantizeError, match=r"q_proj: group_size 48 .* 64 input"):
        run_pipeline(tiny_base, recipe, tmp_path / "out", tmp_path / "work")

    assert not list(tmp_path.iterdir())


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


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (
            GPT2Config(vocab_size=VOCAB_SIZE, n_embd=32, n_layer=1, n_head=2),
            "GPT2LMHeadModel: GPT2Model has no list of decoder blocks",
        ),
        (
            MambaConfig(vocab_size=VOCAB_SIZE, hidden_size=32, num_hidden_layers=1),
            r"MambaForCausalLM: backbone\.layers\.0 has no linears",
        ),
    ],
)
def test_an_architecture_that_is_not_supported_is_refused(
    tiny_recipe: Recipe, tmp_path: Path, config: PretrainedConfig, reason: str
) -> None:
    model = save_random(config, tmp_path / "model", torch.float32)
    base = open_model(model, tmp_path / "work")

    with pytest.raises(QuantizeError, match=reason):
        run_pipeline(base, tiny_recipe, tmp_path / "out", tmp_path / "work")

    assert [path.name for path in tmp_path.iterdir()] == ["model"]


MEASURED_RUN = """
import re, sys
from pathlib import Path
from tacq_vllm.cli import app

app(sys.argv[1:], standalone_mode=False)
# Of this program alone: `ru_maxrss` counts the one that started it, too.
status = Path("/proc/self/status").read_text()
print("peak", re.search(r"VmHWM:\\s+(\\d+) kB", status)[1])
"""


@pytest.mark.slow
def test_depth_costs_no_memory(text_file: Path, tmp_path: Path) -> None:
    """The weights of twelve blocks more are 44 MB, in float32 88."""
    recipe = tmp_path / "recipe.yaml"
    # The size of a shard is memory that is asked for.
    recipe.write_text("gptq: {grid_steps: 4}\nexport: {max_shard_bytes: 1000000}\n")
    peaks = []
    for depth in (4, 16):
        config = LlamaConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=512,
            intermediate_size=512,
            num_hidden_layers=depth,
            num_attention_heads=8,
            max_position_embeddings=128,
        )
        model = save_random(config, tmp_path / f"model{depth}")
        arguments = ["quantize", model, "--recipe", recipe]
        arguments += ["--output", tmp_path / f"out{depth}", "--device", "cpu"]
        arguments += ["--calibration", text_file, "--num-samples", 2, "--seq-len", 16]
        result = subprocess.run(
            [sys.executable, "-c", MEASURED_RUN, *map(str, arguments)],
            capture_output=True,
            text=True,
            # With a threshold malloc gives back what is freed.
            env=os.environ
            | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"},
            check=False,
        )
        assert result.returncode == 0, result.stderr
        peaks.append(int(result.stdout.split("peak ")[1]))

    assert peaks[1] < 1.05 * peaks[0], peaks
