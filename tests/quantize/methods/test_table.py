"""What holds for every method."""

import json
from pathlib import Path
from typing import get_args

import pytest
from torch import Tensor

from tacq_vllm.cli import MethodOption
from tacq_vllm.config import Method, Recipe
from tacq_vllm.format.checkpoint import CheckpointReader, read_any_schema
from tacq_vllm.format.inspection import inspect_checkpoint
from tacq_vllm.format.schema import QuantizationSchema
from tacq_vllm.quantize.methods.table import METHODS
from tacq_vllm.quantize.model import BaseModel
from tests.builders import stored_weights
from tests.conftest import quick, run_pipeline
from tests.quantize.test_world import torchrun

OTHERS = ["rtn", "squeezellm", "spqr", "slim-llm", "fineq"]
"""Those that are not GPTQ with or without kept weights."""


def test_every_method_can_be_asked_for() -> None:
    assert set(METHODS) == set(get_args(Method)) == {m.value for m in MethodOption}


TOGETHER = """
import json, sys
from pathlib import Path
import torch
from tacq_vllm.config import Recipe
from tacq_vllm.quantize.model import open_base_model
from tacq_vllm.quantize.pipeline import quantize_model
from tacq_vllm.quantize.progress import Progress
from tacq_vllm.quantize.workdir import WorkDir
from tacq_vllm.quantize.world import open_world

model, folder = sys.argv[1], Path(sys.argv[2])
workdir = WorkDir(folder / "work")
with open_world(torch.device("cpu")) as (world, device):
    for name, recipe in json.loads(sys.argv[3]).items():
        with world.leader_first():
            base = open_base_model(model, device, workdir)
        recipe = Recipe.model_validate(recipe)
        quantize_model(
            base, recipe, folder / name, workdir, Progress(), lambda *_: None,
            world=world,
        )
"""


@pytest.fixture(scope="module")
def recipes(tiny_recipe: Recipe) -> dict[str, Recipe]:
    fields = {"group_size": 16, "calibration.num_samples": 6}
    of_clusters = {
        "bits": 2,
        "group_size": -1,
        "fineq.rounding": "gptq",
        "fineq.keep_outliers": True,
    }
    return {
        name: quick(
            tiny_recipe,
            method=name,
            **(fields | (of_clusters if name == "fineq" else {})),
        )
        for name in OTHERS
    }


@pytest.fixture(scope="module")
def in_two(
    tiny_model: Path,
    recipes: dict[str, Recipe],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The folder of what two processes have made."""
    folder = tmp_path_factory.mktemp("two")
    asked = {name: recipe.model_dump(mode="json") for name, recipe in recipes.items()}
    result = torchrun(2, TOGETHER, tiny_model, folder, json.dumps(asked))
    assert result.returncode == 0, result.stderr
    return folder


def weights(folder: Path) -> dict[str, Tensor]:
    schema = read_any_schema(folder)
    if isinstance(schema, QuantizationSchema):
        return stored_weights(folder)
    with CheckpointReader(folder) as reader:
        return {name: reader.load(f"{name}.weight") for name in schema.linears}


@pytest.mark.parametrize("method", OTHERS)
def test_two_processes_give_nearly_the_same(
    tiny_base: BaseModel,
    recipes: dict[str, Recipe],
    in_two: Path,
    tmp_path: Path,
    method: str,
) -> None:
    """Sums in another order; without any text there are none."""
    run_pipeline(tiny_base, recipes[method], tmp_path / "one", tmp_path / "work")

    one, two = weights(tmp_path / "one"), weights(in_two / method)

    for name, W in one.items():
        changed = float((two[name] != W).float().mean())
        assert changed <= (0.0 if method == "rtn" else 0.02), name
        assert float((two[name] - W).norm() / W.norm()) < 0.03, name
    figures = [inspect_checkpoint(p) for p in (tmp_path / "one", in_two / method)]
    bits = [figure.effective_bits for figure in figures]
    assert bits[1] == pytest.approx(bits[0], abs=0.01)
