import json
from pathlib import Path

import pytest
import torch

from tacq_vllm.config import Recipe, RecipeError, override_recipe
from tacq_vllm.format.checkpoint import CONFIG_NAME, CheckpointReader, read_schema
from tacq_vllm.format.clusters import BLOCK
from tacq_vllm.format.inspection import Inspection, inspect_checkpoint
from tacq_vllm.format.stored import unpack_outliers
from tacq_vllm.format.validation import find_faults, load_linear
from tacq_vllm.kernels.reference import dequantize
from tacq_vllm.quantize.clusters import round_to_clusters
from tacq_vllm.quantize.errors import QuantizeError
from tacq_vllm.quantize.model import BaseModel
from tests.builders import stored_weights
from tests.conftest import (
    Recorder,
    TinyLlama,
    open_model,
    quick,
    run_pipeline,
)
from tests.quantize.methods.resuming import assert_another_text_counts, assert_goes_on

CLUSTERS = {"method": "fineq", "bits": 2, "group_size": -1}
NO_TEXT = {"calibration.sources": ("nowhere.txt",)}
ON_TEXT = {"fineq.rounding": "gptq"}
KEEPING = {"fineq.keep_outliers": True, "outliers.ratio": 0.01}


@pytest.fixture
def recipe(tiny_recipe: Recipe) -> Recipe:
    return quick(tiny_recipe, **CLUSTERS)


def expected_bits(figures: Inspection) -> float:
    """7/3 bits, of rows padded to blocks, a scale a row, and kept weights."""
    nbytes = sum(
        linear.out_features * (28 * -(-linear.in_features // BLOCK) + 2)
        + 4 * (linear.out_features + 1 + linear.outliers)
        for linear in figures.linears
    )
    return nbytes * 8 / figures.weights


def test_a_checkpoint_without_any_text(
    tiny_base: BaseModel, recipe: Recipe, tmp_path: Path
) -> None:
    """As the paper: to the nearest codes, nothing kept."""
    recipe = override_recipe(recipe, NO_TEXT)
    recorder = Recorder()

    run_pipeline(tiny_base, recipe, tmp_path / "out", tmp_path / "work", recorder)

    assert recorder.phases == {"quantization": 14, "export": 1}
    assert find_faults(tmp_path / "out") == []
    schema = read_schema(tmp_path / "out")
    assert (schema.format_version, schema.layout, schema.bits) == (2, "clusters", 2)
    assert schema.recipe["fineq"] == {"rounding": "nearest", "keep_outliers": False}
    # Heads of 16 rows may be parted, rows of 64 or 128 columns not.
    assert schema.tensor_parallel_sizes == (1,)
    figures = inspect_checkpoint(tmp_path / "out")
    assert figures.outliers == 0
    assert figures.effective_bits == pytest.approx(expected_bits(figures))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "# tiny-llama, FineQ 2.33 bits\n" in card
    assert "| calibration data | none |" in card
    for name, weight in stored_weights(tmp_path / "out").items():
        W = tiny_base.weight(name)
        nearest = round_to_clusters(W, None, -1, torch.bfloat16, recipe.gptq)
        assert torch.equal(weight, nearest.weight)


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_the_weights_that_matter_are_kept_exactly(
    tiny_base: BaseModel, recipe: Recipe, tmp_path: Path, rounding: str
) -> None:
    recipe = override_recipe(recipe, {**KEEPING, "fineq.rounding": rounding})
    recorder = Recorder()

    run_pipeline(tiny_base, recipe, tmp_path / "out", tmp_path / "work", recorder)

    phases = ["calibration", "plain quantization", "gradients", "quantization"]
    assert set(recorder.phases) <= {*phases, "export"}
    assert {"plain quantization", "gradients"} <= set(recorder.phases)
    assert find_faults(tmp_path / "out") == []
    schema = read_schema(tmp_path / "out")
    figures = inspect_checkpoint(tmp_path / "out")
    assert figures.outliers == int(0.01 * figures.weights)
    assert figures.effective_bits == pytest.approx(expected_bits(figures))
    with CheckpointReader(tmp_path / "out") as reader:
        for name in schema.linears:
            packed = load_linear(reader, schema, name)
            kept = unpack_outliers(packed)
            where = (kept.rows, kept.columns.long())
            W = tiny_base.weight(name)
            assert torch.equal(dequantize(packed)[where], W[where])
    report = (tmp_path / "out" / "report.jsonl").read_text().splitlines()
    assert all(json.loads(line)["bits"] == 2 for line in report)


def test_each_improvement_loses_less_of_the_output(
    tiny_base: BaseModel, recipe: Recipe, tmp_path: Path
) -> None:
    """Measured by what each linear reports, on the calibration text."""
    errors = []
    for name, fields in (("gptq", ON_TEXT), ("both", {**ON_TEXT, **KEEPING})):
        chosen = override_recipe(recipe, fields)
        run_pipeline(tiny_base, chosen, tmp_path / name, tmp_path / "work")
        report = (tmp_path / name / "report.jsonl").read_text().splitlines()
        errors.append(sum(json.loads(line)["error"] for line in report))

    assert errors[1] < errors[0]


def test_it_goes_on_where_it_was_interrupted(
    tiny_base: BaseModel, recipe: Recipe, tmp_path: Path
) -> None:
    assert_goes_on(tiny_base, override_recipe(recipe, NO_TEXT), tmp_path)


@pytest.mark.parametrize("saliency", ["tacq", "msg"])
def test_another_text_finds_nothing(
    tiny_base: BaseModel, recipe: Recipe, tmp_path: Path, saliency: str
) -> None:
    """Codes need no text, the choice of kept weights does."""
    recipe = override_recipe(recipe, {**KEEPING, "outliers.saliency": saliency})

    assert_another_text_counts(tiny_base, recipe, tmp_path)


def test_groups_of_whole_blocks(
    tiny_llama: TinyLlama, recipe: Recipe, tmp_path: Path
) -> None:
    sizes = {"hidden_size": 192, "intermediate_size": 384, "num_hidden_layers": 1}
    base = open_model(tiny_llama(torch.bfloat16, **sizes), tmp_path / "opened")
    grouped = override_recipe(recipe, {**NO_TEXT, "group_size": BLOCK})

    run_pipeline(base, grouped, tmp_path / "out", tmp_path / "work")

    assert find_faults(tmp_path / "out") == []
    figures = inspect_checkpoint(tmp_path / "out")
    rows = sum(linear.out_features + 1 for linear in figures.linears)
    assert figures.effective_bits == pytest.approx(
        7 / 3 + 16 / BLOCK + 32 * rows / figures.weights
    )
    # Two ranks have two heads and half of the columns each.
    assert read_schema(tmp_path / "out").tensor_parallel_sizes == (1, 2)
    block = json.loads((tmp_path / "out" / CONFIG_NAME).read_text())
    assert block["quantization_config"]["group_size"] == BLOCK


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"bits": 3}, "bits 3: fineq has codes of 2"),
        ({"group_size": 64}, "group_size 64: of fineq it is -1"),
        ({"fineq.rounding": "up"}, "fineq.rounding: "),
    ],
)
def test_what_clusters_cannot_be(
    recipe: Recipe, fields: dict[str, object], reason: str
) -> None:
    with pytest.raises(RecipeError, match=reason):
        override_recipe(recipe, fields)


def test_a_group_that_does_not_divide(
    tiny_base: BaseModel, recipe: Recipe, tmp_path: Path
) -> None:
    grouped = override_recipe(recipe, {"group_size": BLOCK})

    with pytest.raises(QuantizeError, match="group_size 96 does not divide its 64"):
        run_pipeline(tiny_base, grouped, tmp_path / "out", tmp_path / "work")
