from pathlib import Path
from typing import Any

import pytest

from tacq_vllm.config import (
    Recipe,
    RecipeError,
    load_recipe,
    override_recipe,
    parse_section,
    published_choices,
    read_yaml,
    recipe_folder,
)

READY_MADE = sorted(
    path.relative_to(recipe_folder()).with_suffix("").as_posix()
    for path in recipe_folder().rglob("*.yaml")
)


def test_there_are_recipes() -> None:
    assert "smollm2/demo" in READY_MADE


@pytest.mark.parametrize("name", READY_MADE)
def test_every_recipe_loads_by_name_and_by_path(name: str) -> None:
    recipe = load_recipe(name)

    assert recipe == load_recipe(str(recipe_folder() / f"{name}.yaml"))
    # No local paths: whoever installs the wheel can follow it.
    assert all("/" not in source for source in recipe.calibration.sources)


def test_a_recipe_survives_a_round_trip() -> None:
    recipe = load_recipe("smollm2/demo")

    assert parse_section(Recipe, recipe.model_dump(mode="json"), "again") == recipe


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"calibration": {"packing": True, "loss": "completion"}}, "needs loss `all`"),
        ({"surprise": 1}, "surprise: Extra inputs are not permitted"),
        ({"gptq": {"percdamp": 1}}, r"gptq\.percdamp: Extra inputs"),
        ({"bits": 5}, "bits: Input should be 2, 3 or 4"),
        ({"method": "magic"}, "method: Input should be"),
        ({"group_size": 0}, "group_size 0: use -1 or a multiple of 16"),
        ({"group_size": 8}, "group_size 8: use -1 or a multiple of 16"),
        ({"group_size": 100}, "group_size 100: use -1 or a multiple of 16"),
        ({"group_size": -64}, "group_size -64: use -1 or a multiple of 16"),
        ({"method": "slim-llm"}, "slim-llm chooses bits by group: give a group_size"),
        (
            {"method": "fineq", "bits": 2, "group_size": 48},
            "group_size 48: of fineq it is -1, the whole row, or a multiple of 96",
        ),
        ({"bits": 5, "group_size": "x"}, "bits: .*; group_size: "),
        ({"outliers": {"ratio": 1.0}}, r"outliers\.ratio: "),
        ({"outliers": {"saliency": "luck"}}, r"outliers\.saliency: "),
        ({"calibration": {"num_samples": 0}}, r"calibration\.num_samples: "),
        ({"calibration": {"sources": []}}, r"calibration\.sources: "),
        ({"export": {"dtype": "float32"}}, r"export\.dtype"),
    ],
)
def test_bad_fields_are_named(content: dict[str, Any], reason: str) -> None:
    with pytest.raises(RecipeError, match=f"my recipe: .*{reason}") as caught:
        parse_section(Recipe, content, source="my recipe")
    assert "\n" not in str(caught.value)


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(RecipeError, match=r"no recipe 'smollm9/demo'.*smollm2/demo"):
        load_recipe("smollm9/demo")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"bits: [", "not YAML"),
        (b"- bits", "a recipe is a mapping"),
        (b"", "a recipe is a mapping"),
        (b"bits: \xff", "not YAML"),
        (b"!!python/object/apply:os.getcwd []", "not YAML"),
    ],
)
def test_files_that_are_no_recipes(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(content)

    with pytest.raises(RecipeError, match=rf"mine\.yaml: {reason}"):
        load_recipe(str(path))


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=f"{tmp_path}: Is a directory; give a .yaml"):
        read_yaml(tmp_path)


def test_what_a_recipe_leaves_open() -> None:
    """The figures in docs/results.md were measured with these."""
    assert Recipe().model_dump() == {
        "method": "tacq",
        "bits": 3,
        "group_size": -1,
        "calibration": {
            "sources": ("self",),
            "num_samples": 128,
            "seq_len": 2048,
            "packing": False,
            "loss": "all",
            "seed": 0,
            "temperature": 0.7,
        },
        "outliers": {
            "ratio": 0.0035,
            "saliency": "tacq",
            "scope": "model",
            "kept_value": "original",
        },
        "gptq": {
            "damp_percent": 0.01,
            "block_size": 128,
            "activation_order": True,
            "refit_scales": True,
            "grid_steps": 80,
            "grid_max_shrink": 0.8,
            "grid_norm": 2.4,
        },
        "squeezellm": {
            "sensitive_ratio": 0.0005,
            "outlier_ratio": 0.0045,
            "iterations": 50,
        },
        "spqr": {
            "code_bits": None,
            "group_size": 16,
            "statistics_bits": 3,
            "statistics_group_size": 16,
            "outlier_ratio": 0.016,
            "outlier_threshold": None,
            "damp_percent": 1.0,
        },
        "slim_llm": {
            "salience_weight": 1.0,
            "salience_deviations": 2.0,
            "search_range": 0.1,
            "search_steps": 50,
            "search_tokens": 4096,
        },
        "fineq": {"rounding": "nearest", "keep_outliers": False},
        "export": {"dtype": "auto", "max_shard_bytes": 4_000_000_000},
    }


def test_overrides_replace_single_fields() -> None:
    recipe = Recipe(bits=2)

    changed = override_recipe(
        recipe, {"bits": None, "group_size": 64, "calibration.seed": 7}
    )

    assert changed.bits == 2
    assert changed.group_size == 64
    assert changed.calibration.seed == 7
    assert recipe.calibration.seed == 0
    assert changed.calibration.seq_len == recipe.calibration.seq_len
    assert recipe.group_size == -1


def test_overrides_are_checked() -> None:
    with pytest.raises(RecipeError, match=r"options: calibration\.seed: "):
        override_recipe(Recipe(), {"calibration.seed": -1})


def test_errors_name_what_a_user_has_typed() -> None:
    """Once, where it sets two fields."""
    flags = {"calibration.num_samples": "--size", "gptq.block_size": "--size"}
    fields = dict.fromkeys(flags, 0) | {"gptq.grid_steps": 0}

    with pytest.raises(RecipeError) as refusal:
        override_recipe(Recipe(), fields, flags)

    reason = "Input should be greater than or equal to 1"
    assert str(refusal.value) == f"options: --size: {reason}; gptq.grid_steps: {reason}"


@pytest.mark.parametrize(
    ("fields", "reads"),
    [
        ({"method": "tacq"}, True),
        ({"method": "gptq"}, True),
        ({"method": "squeezellm"}, True),
        ({"method": "rtn"}, False),
        ({"method": "fineq", "bits": 2}, False),
        ({"method": "fineq", "bits": 2, "fineq": {"rounding": "gptq"}}, True),
        ({"method": "fineq", "bits": 2, "fineq": {"keep_outliers": True}}, True),
    ],
)
def test_what_needs_text(fields: dict[str, Any], reads: bool) -> None:
    assert Recipe.model_validate(fields).reads_calibration is reads


def test_a_checkpoint_does_not_tell_where_its_text_lay() -> None:
    recipe = Recipe.model_validate({"calibration": {"sources": ["c4", "/home/a.txt"]}})

    assert published_choices(recipe)["calibration"]["sources"] == ["c4", "a.txt"]


@pytest.mark.parametrize(
    ("fields", "keeps"),
    [
        ({"method": "tacq"}, True),
        ({"method": "gptq"}, False),
        ({"method": "spqr"}, False),
        ({"method": "fineq", "bits": 2}, False),
        ({"method": "fineq", "bits": 2, "fineq": {"keep_outliers": True}}, True),
    ],
)
def test_settings_without_effect_are_not_published(
    fields: dict[str, Any], keeps: bool
) -> None:
    recipe = Recipe.model_validate(fields)

    published = published_choices(recipe, recipe.sections_of_others)

    assert recipe.keeps_outliers is keeps
    assert ("outliers" in published) is keeps
    sections = {"squeezellm", "spqr", "slim_llm", "fineq"}
    assert published.keys() & sections == sections & {recipe.method}
