"""What holds for every simulated checkpoint."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from tacq_vllm.config import Recipe
from tacq_vllm.format.checkpoint import CONFIG_NAME, CheckpointReader, read_any_schema
from tacq_vllm.format.inspection import inspect_checkpoint
from tacq_vllm.format.simulated import SimulatedSchema
from tacq_vllm.format.validation import find_faults
from tacq_vllm.quantize.model import BaseModel
from tests.conftest import Recorder, assert_released, run_pipeline


def assert_simulated(
    base: BaseModel, recipe: Recipe, folder: Path, phases: list[str]
) -> SimulatedSchema:
    """Make `folder / "out"` and check all that does not depend on the method."""
    recorder = Recorder()
    output = folder / "out"

    run_pipeline(base, recipe, output, folder / "work", recorder)

    assert list(recorder.phases) == [*phases, "export"]
    assert_released(base)
    config = json.loads((output / CONFIG_NAME).read_text())
    assert "quantization_config" not in config
    schema = read_any_schema(output)
    assert isinstance(schema, SimulatedSchema)
    assert schema.method == recipe.method
    assert Recipe.model_validate(schema.recipe).bits == recipe.bits
    assert set(schema.linears) == set(base.linears())
    (fault,) = find_faults(output)
    assert f"a simulated checkpoint ({recipe.method})" in fault
    figures = inspect_checkpoint(output)
    assert figures.simulated == recipe.method
    assert figures.effective_bits == pytest.approx(schema.effective_bits)
    reports = [json.loads(line) for line in (output / "report.jsonl").open()]
    for report in reports:
        linear = schema.linears[report["name"]]
        assert report["outliers"] == linear.outliers
        assert report["stored_bytes"] == linear.stored_bytes
        assert 0 < report["error"] < 0.5
    card = (output / "README.md").read_text()
    assert ", simulated\n" in card
    assert f"| {schema.effective_bits:.3f} |" in card
    assert "vllm serve" not in card
    assert "\n- simulated\n" in card
    assert "\n- vllm\n" not in card
    # Transformers takes it for what it is: a model in 16 bits.
    model = AutoModelForCausalLM.from_pretrained(output, dtype="auto")
    assert not getattr(model, "is_quantized", False)
    loaded = model.state_dict()
    for name, weight in stored_weights(output, schema):
        assert torch.equal(loaded[f"{name}.weight"].float(), weight)
    return schema


def stored_weights(
    output: Path, schema: SimulatedSchema
) -> Iterator[tuple[str, Tensor]]:
    """Names and weights (float32) of the quantized linears."""
    with CheckpointReader(output) as reader:
        for name in schema.linears:
            yield name, reader.load(f"{name}.weight").float()
