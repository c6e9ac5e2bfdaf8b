"""What holds for every method."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from tacq_vllm.cli import MethodOption
from tacq_vllm.config import Method, Recipe, override_recipe
from tacq_vllm.format.checkpoint import CheckpointReader, read_any_schema
from tacq_vllm.format.clusters import BLOCK
from tacq_vllm.format.inspection import inspect_checkpoint
from tacq_vllm.format.schema import QuantizationSchema
from tacq_vllm.quantize.methods.table import METHODS
from tacq_vllm.quantize.model import BaseModel
from tests.builders import stored_weights
from tests.conftest import Recorder, TinyLlama, open_model, quick, run_pipeline
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


CLUSTERS = {"method": "fineq", "bits": 2, "group_size": -1}
STARTS: dict[str, dict[str, Any]] = {
    "tacq": {"outliers.ratio": 0.01},
    "gptq": {},
    "rtn": {},
    "squeezellm": {"squeezellm.iterations": 2},
    "spqr": {"spqr.outlier_threshold": 0.2},
    "slim-llm": {"slim_llm.search_steps": 2, "slim_llm.search_tokens": 40},
    "fineq": CLUSTERS,
    "fineq with gptq": CLUSTERS | {"fineq.rounding": "gptq"},
    "fineq with outliers": CLUSTERS | {"fineq.keep_outliers": True},
}
"""Recipes to change; a first word that is a method is theirs."""

PLAIN = {"group_size": 64, "export.dtype": "float16"}
GRID = {"gptq.grid_steps": 5, "gptq.grid_max_shrink": 0.5, "gptq.grid_norm": 2.0}
GPTQ = {
    **GRID,
    "gptq.damp_percent": 0.02,
    "gptq.block_size": 64,
    "gptq.activation_order": False,
    "gptq.refit_scales": False,
}
OUTLIERS = {
    "outliers.ratio": 0.02,
    "outliers.saliency": "qal",
    "outliers.scope": "linear",
    "outliers.kept_value": "compensated",
}
SETTINGS: dict[str, dict[str, Any]] = {
    "tacq": PLAIN | {"bits": 4} | GPTQ | OUTLIERS,
    "gptq": PLAIN | {"bits": 4} | GPTQ,
    "rtn": PLAIN | {"bits": 4} | GRID,
    "squeezellm": {
        "bits": 4,
        "export.dtype": "float16",
        "squeezellm.sensitive_ratio": 0.01,
        "squeezellm.outlier_ratio": 0.01,
        "squeezellm.iterations": 3,
    },
    "spqr": {
        "bits": 4,
        "export.dtype": "float16",
        "spqr.code_bits": 4,
        "spqr.group_size": 8,
        "spqr.statistics_bits": 4,
        "spqr.statistics_group_size": 8,
        "spqr.outlier_ratio": 0.02,
        "spqr.outlier_threshold": 0.5,
        "spqr.damp_percent": 0.5,
    },
    "slim-llm": {
        **PLAIN,
        "bits": 4,
        "slim_llm.salience_weight": 2.0,
        "slim_llm.salience_deviations": 1.0,
        "slim_llm.search_range": 0.2,
        "slim_llm.search_steps": 3,
        "slim_llm.search_tokens": 20,
        "gptq.damp_percent": 0.02,
        "gptq.block_size": 64,
        "gptq.grid_norm": 2.0,
    },
    "fineq": {
        "group_size": BLOCK,
        "export.dtype": "float16",
        **GRID,
        "fineq.rounding": "gptq",
        "fineq.keep_outliers": True,
    },
    "fineq with gptq": GPTQ,
    "fineq with outliers": OUTLIERS,
}
"""All that the codes of a method depend on, with other values than it starts with."""


@pytest.fixture(scope="module")
def wide_base(
    tiny_llama: TinyLlama, tmp_path_factory: pytest.TempPathFactory
) -> BaseModel:
    """One block, of linears that groups of any method divide."""
    sizes = {"hidden_size": 192, "intermediate_size": 192, "num_hidden_layers": 1}
    return open_model(
        tiny_llama(torch.bfloat16, **sizes), tmp_path_factory.mktemp("opened")
    )


@pytest.fixture(scope="module")
def started(
    wide_base: BaseModel, tiny_recipe: Recipe, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Recipe, Path]]:
    """By the name of a start: its recipe, and the work folder of a run to its end."""

    @cache
    def start(name: str) -> tuple[Recipe, Path]:
        folder = tmp_path_factory.mktemp("start")
        recipe = quick(tiny_recipe, **({"method": name.split()[0]} | STARTS[name]))
        run_pipeline(wide_base, recipe, folder / "out", folder / "work")
        return recipe, folder / "work"

    return start


@pytest.mark.parametrize(
    ("name", "field"),
    [(n, field) for n, fields in SETTINGS.items() for field in fields],
)
def test_another_setting_finds_no_codes(
    wide_base: BaseModel,
    started: Callable[[str], tuple[Recipe, Path]],
    tmp_path: Path,
    name: str,
    field: str,
) -> None:
    recipe, work = started(name)
    other = override_recipe(recipe, {field: SETTINGS[name][field]})
    assert other != recipe

    # As soon as there is something to quantize.
    with pytest.raises(KeyboardInterrupt):
        run_pipeline(
            wide_base, other, tmp_path / "out", work, Recorder("quantization", 0)
        )


def test_no_setting_is_forgotten() -> None:
    fields = set()
    for name, value in Recipe().model_dump().items():
        parts = value if isinstance(value, dict) else ()
        fields |= {f"{name}.{part}" for part in parts} or {name}
    known = set().union(*SETTINGS.values())

    others = fields - known
    assert known <= fields
    assert {field for field in others if not field.startswith("calibration.")} == {
        "method",
        "export.max_shard_bytes",
    }
