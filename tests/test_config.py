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


def test_overrides_replace_single_fields() -> None:
    recipe = Recipe(bits=2)

    changed = override_recipe(
        recipe, {"bits": None, "group_size": 64, "calibration.seed": 7}
    )

    assert changed.bits == 2
    assert changed.group_size == 64
    assert changed.calibration.seed == 7
    assert changed.calibration.seq_len == recipe.calibration.seq_len
    assert recipe.group_size == -1


def test_overrides_are_checked() -> None:
    with pytest.raises(RecipeError, match=r"options: calibration\.seed: "):
        override_recipe(Recipe(), {"calibration.seed": -1})


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
