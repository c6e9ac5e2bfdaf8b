import pytest

from tacq_vllm.compare.matrix import METHODS, SALIENCIES, Cell, Matrix
from tacq_vllm.config import Recipe, RecipeError

CELL = Cell(method="gptq", bits=2, group_size=64, calibration="c4", seed=3)


def matrix(**choices: object) -> Matrix:
    usual = {
        "methods": ["gptq"],
        "bits": [3],
        "group_sizes": [64],
        "calibrations": ["c4"],
        "seeds": [0],
        "options": "",
    }
    return Matrix(**(usual | choices))  # type: ignore[arg-type]


def test_every_combination_once() -> None:
    cells = matrix(methods=["gptq", "msg"], bits=[2, 3], seeds=[0, 1]).cells(Recipe())

    assert len(set(cells)) == len(cells) == 8
    assert [cell.method for cell in cells[:2]] == ["gptq", "msg"]
    assert [cell.seed for cell in cells] == [0] * 4 + [1] * 4


def test_a_method_with_groups_of_its_own_is_one_cell() -> None:
    choices = matrix(methods=["rtn", "spqr", "squeezellm"], group_sizes=[64, 128])

    base = Recipe(spqr={"group_size": 8})  # type: ignore[arg-type]
    cells = choices.cells(base)

    assert [(cell.method, cell.group_size) for cell in cells] == [
        ("rtn", 64),
        ("spqr", 8),
        ("squeezellm", -1),
        ("rtn", 128),
    ]
    assert [cell.recipe(base).own_group_size for cell in cells] == [64, 8, -1, 128]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_of_recipes_is_one(method: str) -> None:
    grid = {"bits": [2], "group_sizes": [-1]} if method == "fineq" else {}
    (cell,) = matrix(methods=[method], **grid).cells(Recipe())

    assert cell.recipe(Recipe()).method == method


@pytest.mark.parametrize("saliency", SALIENCIES)
def test_every_saliency_is_a_method(saliency: str) -> None:
    recipe = CELL.model_copy(update={"method": saliency}).recipe(Recipe())

    assert (recipe.method, recipe.outliers.saliency) == ("tacq", saliency)


def test_a_cell_changes_its_fields_of_the_recipe() -> None:
    options = "gptq.refit_scales=false outliers.ratio=0.01"
    base = Recipe(bits=4, gptq={"grid_steps": 7})  # type: ignore[arg-type]

    recipe = CELL.model_copy(update={"options": options}).recipe(base)

    assert (recipe.bits, recipe.group_size, recipe.gptq.grid_steps) == (2, 64, 7)
    assert recipe.calibration.sources == ("c4",)
    assert recipe.calibration.seed == 3
    assert not recipe.gptq.refit_scales
    assert recipe.outliers.ratio == 0.01


def test_a_cell_of_clusters() -> None:
    options = "fineq.rounding=gptq fineq.keep_outliers=true"
    fields = {"method": "fineq", "group_size": -1, "options": options}

    recipe = CELL.model_copy(update=fields).recipe(Recipe())

    assert (recipe.method, recipe.fineq.rounding) == ("fineq", "gptq")
    assert recipe.fineq.keep_outliers


def test_an_unknown_method() -> None:
    with pytest.raises(RecipeError, match="magic: no such method; there are tacq, "):
        matrix(methods=["magic"]).cells(Recipe())


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ("gptq.grid_steps", "--option gptq.grid_steps: give it as FIELD=VALUE"),
        ("bits=2", "--option bits=2: use --bits"),
        ("calibration.seed=1", "--option calibration.seed=1: use --seeds"),
        ("method=rtn", "method=rtn: use --methods"),
        ("group_size=64", "group_size=64: use --group-size"),
        ("calibration.sources=[c4]", r"sources=\[c4\]: use --calibration"),
        ("outliers.saliency=grad", "saliency=grad: use --methods"),
        ("calibration.num_samples=8", "num_samples=8: use --num-samples"),
        ("calibration.seq_len=8", "seq_len=8: use --seq-len"),
        ('outliers={"ratio":0.1}', "use --methods"),
        ("gptq.grid_steps=", "gptq.grid_steps=: a value is missing"),
        ("spqr.code_bits=null", "spqr.code_bits=null: a value is missing"),
        ("gptq.grid_steps=[", r"gptq.grid_steps=\[: the value is not YAML"),
    ],
)
def test_options_that_say_nothing_or_what_a_flag_says(
    options: str, reason: str
) -> None:
    with pytest.raises(RecipeError, match=reason):
        matrix(options=options).cells(Recipe())


@pytest.mark.parametrize("choice", ["methods", "bits", "seeds", "calibrations"])
def test_a_choice_without_anything(choice: str) -> None:
    with pytest.raises(RecipeError, match="nothing to compare"):
        matrix(**{choice: []}).cells(Recipe())


def test_two_sources_of_one_name() -> None:
    sources = ["a/train.txt", "a/train.txt", "b/train.txt"]

    assert len(matrix(calibrations=sources[:2]).cells(Recipe())) == 1
    with pytest.raises(RecipeError, match=r"2 sources are called train\.txt"):
        matrix(calibrations=sources).cells(Recipe())


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("bits", 5, "bits: Input should be"),
        ("group_size", 24, "group_size 24"),
        ("options", "gptq.nothing=1", "gptq.nothing: Extra inputs"),
        ("options", "nothing.at.all=1", "no section 'nothing'"),
        ("options", "gptq.grid_steps.at=1", "no section 'grid_steps'"),
    ],
)
def test_choices_that_recipes_refuse(field: str, value: object, reason: str) -> None:
    with pytest.raises(RecipeError, match=reason):
        CELL.model_copy(update={field: value}).recipe(Recipe())
