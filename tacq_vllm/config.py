"""Recipes: everything that decides what a quantized checkpoint will be.

A recipe is a flat YAML file, complete and without inheritance. The command line
overrides single fields; the result is stored in the checkpoint.
"""

from collections.abc import Collection, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import yaml
from pydantic import Field, ValidationError, model_validator

from tacq_vllm.config_methods import (
    FineqConfig,
    Section,
    SlimLlmConfig,
    SpqrConfig,
    SqueezeLlmConfig,
)

Method = Literal["tacq", "gptq", "rtn", "squeezellm", "spqr", "slim-llm", "fineq"]
OWN_GROUPS: tuple[Method, ...] = ("squeezellm", "spqr")
"""Methods that do not ask for `group_size`."""
SaliencyMetric = Literal["tacq", "qal", "msg", "grad", "fisher", "magnitude"]
StorageDtype = Literal["bfloat16", "float16"]

_MANY = 10**9
"""More samples, or tokens in a sample, than anybody has."""

AnySection = TypeVar("AnySection", bound="Section")


class RecipeError(ValueError):
    """A recipe that cannot be followed; the message says what to change."""


class CalibrationConfig(Section):
    """The text that gradients and Hessians are measured on."""

    sources: tuple[str, ...] = Field(
        ("self",),
        min_length=1,
        description="Named sets (wikitext2, c4, mmlu, gsm8k, spider), `self` (text "
        "the 16-bit model writes itself), or paths of .jsonl / .txt files, also "
        "gzipped; their samples are mixed.",
    )
    num_samples: int = Field(
        128,
        ge=1,
        le=_MANY,
        description="Number of windows of running text; samples of a task, which stay "
        "whole, fill as many tokens.",
    )
    seq_len: int = Field(2048, ge=2, le=_MANY, description="Tokens in each window.")
    packing: bool = Field(
        False,
        description="Join a task's samples and cut them into windows too: for many "
        "short ones. Paper: false.",
    )
    loss: Literal["all", "completion"] = Field(
        "all",
        description="Gradients of the loss on all tokens (paper), or on completions "
        "and the assistant's turns alone.",
    )
    seed: int = Field(0, ge=0, lt=2**63, description="Seed of sampling and generation.")
    temperature: float = Field(
        0.7, gt=0.0, description="Sampling temperature of `self`."
    )

    @model_validator(mode="after")
    def _check_packing(self) -> Self:
        if self.packing and self.loss == "completion":
            raise ValueError(
                "packing cuts completions from their prompts: it needs loss `all`"
            )
        return self


class OutlierConfig(Section):
    """Which weights stay in 16 bits."""

    ratio: float = Field(
        0.0035,
        ge=0.0,
        lt=1.0,
        description="Share of the quantized linears' weights kept, over all of them "
        "together (TaCQ paper, p).",
    )
    saliency: SaliencyMetric = Field(
        "tacq",
        description="Score by which weights are kept: tacq |W|·|g|·|Q(W)-W|, "
        "qal |g|·|Q(W)-W|, msg |W|·|g|, grad |g|, fisher g², magnitude |W|.",
    )
    scope: Literal["model", "linear"] = Field(
        "model",
        description="One budget for the whole model (paper), or the same share of "
        "every linear.",
    )
    kept_value: Literal["compensated", "original"] = Field(
        "original",
        description="Keep a weight as it is in the base model (the paper's wording), "
        "or as GPTQ's error compensation has moved it (its reference code). Measured "
        "in docs/results.md.",
    )


class GptqConfig(Section):
    """GPTQ and the grid that it rounds to."""

    damp_percent: float = Field(
        0.01, gt=0.0, lt=1.0, description="Share of the Hessian's mean diagonal added."
    )
    block_size: int = Field(128, ge=1, description="Columns per lazy batch update.")
    activation_order: bool = Field(
        True,
        description="Round the columns with the largest inputs first, on grids fitted "
        "before; the stored order does not change. Paper: false.",
    )
    refit_scales: bool = Field(
        True,
        description="Fit the scales once more when all codes are known. Paper: false.",
    )
    grid_steps: int = Field(
        80, ge=1, description="Shrink factors tried per grid, 1.0 among them."
    )
    grid_max_shrink: float = Field(
        0.8, ge=0.0, lt=1.0, description="The smallest shrink factor is 1 minus this."
    )
    grid_norm: float = Field(
        2.4, gt=0.0, description="Exponent of the rounding error that a grid minimizes."
    )


class ExportConfig(Section):
    """How the checkpoint is written."""

    dtype: StorageDtype | Literal["auto"] = Field(
        "auto",
        description="16-bit type of scales, kept weights and unquantized tensors; auto "
        "takes the base model's, or bfloat16 where that is float32.",
    )
    max_shard_bytes: int = Field(
        4_000_000_000, ge=1, description="A shard grows no larger, one tensor aside."
    )


class Recipe(Section):
    """All that `tacq quantize` needs to know beside the model."""

    method: Method = Field(
        "tacq",
        description="tacq; gptq: without kept weights; rtn: each weight rounded by "
        "itself, on the same grids, without any text; fineq: clusters of three "
        "weights; or, simulated, squeezellm, spqr or slim-llm (docs/methods.md).",
    )
    bits: Literal[2, 3, 4] = Field(
        3,
        description="Bits of a code; slim-llm: on average; spqr: one less; fineq: 2, "
        "and 3 beside an outlier, 2.33 with its indices.",
    )
    group_size: int = Field(
        -1,
        description="Input columns that share a scale; -1: the whole row. fineq: -1 or "
        "a multiple of 96; squeezellm always has the row, spqr its own.",
    )
    calibration: CalibrationConfig = CalibrationConfig()
    outliers: OutlierConfig = OutlierConfig()
    gptq: GptqConfig = GptqConfig()
    squeezellm: SqueezeLlmConfig = SqueezeLlmConfig()
    spqr: SpqrConfig = SpqrConfig()
    slim_llm: SlimLlmConfig = SlimLlmConfig()
    fineq: FineqConfig = FineqConfig()
    export: ExportConfig = ExportConfig()

    @model_validator(mode="after")
    def _check_grid(self) -> Self:
        if self.group_size != -1 and (self.group_size < 16 or self.group_size % 16):
            raise ValueError(
                f"group_size {self.group_size}: use -1 or a multiple of 16"
            )
        if self.method == "slim-llm" and self.group_size == -1:
            raise ValueError(
                "slim-llm chooses bits by group: give a group_size (its paper: 128)"
            )
        if self.method == "fineq" and self.bits != 2:
            raise ValueError(
                f"bits {self.bits}: fineq has codes of 2, and of 3 beside an outlier: "
                "give 2"
            )
        if self.method == "fineq" and self.group_size != -1 and self.group_size % 96:
            raise ValueError(
                f"group_size {self.group_size}: of fineq it is -1, the whole row, or a "
                "multiple of 96"
            )
        return self

    @property
    def own_group_size(self) -> int:
        """Columns that share a scale in this method; -1: the whole row."""
        if self.method not in OWN_GROUPS:
            return self.group_size
        return self.spqr.group_size if self.method == "spqr" else -1

    @property
    def keeps_outliers(self) -> bool:
        """Whether the method keeps weights as `outliers` says."""
        return self.method == "tacq" or (
            self.method == "fineq" and self.fineq.keep_outliers
        )

    @property
    def reads_calibration(self) -> bool:
        """Whether the method looks at calibration text at all."""
        rounds_alone = self.method == "fineq" and self.fineq.rounding != "gptq"
        return self.keeps_outliers or not (self.method == "rtn" or rounds_alone)

    @property
    def sections_of_others(self) -> set[str]:
        """The sections without effect: settings of other methods, unused `outliers`."""
        sections = {"squeezellm", "spqr", "slim_llm", "fineq"}
        if not self.keeps_outliers:
            sections.add("outliers")
        return sections - {self.method.replace("-", "_")}


def recipe_folder() -> Path:
    """Folder of the ready-made recipes: in the wheel, or in a source checkout."""
    package = Path(str(files("tacq_vllm")))
    installed = package / "quant_config"
    return installed if installed.is_dir() else package.parent / "quant_config"


def load_recipe(name_or_path: str) -> Recipe:
    """Load a ready-made recipe (`smollm2/demo`) or a YAML file.

    Raises:
        RecipeError: the recipe does not exist or is not valid.
    """
    path = Path(name_or_path)
    if not path.is_file():
        path = recipe_folder() / f"{name_or_path}.yaml"
    if not path.is_file():
        known = sorted(
            p.relative_to(recipe_folder()).with_suffix("").as_posix()
            for p in recipe_folder().rglob("*.yaml")
        )
        raise RecipeError(
            f"no recipe {name_or_path!r}: give a .yaml file or one of {known}"
        )
    return parse_section(Recipe, read_yaml(path), source=str(path))


def read_yaml(path: Path) -> dict[str, Any]:
    """Read the fields that a YAML file gives.

    Raises:
        RecipeError: it cannot be read, is not YAML, or no mapping.
    """
    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise RecipeError(f"{path}: {error.strerror}; give a .yaml file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not YAML: {error}") from error
    if not isinstance(content, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of fields")
    return content


def parse_section(
    kind: type[AnySection], content: dict[str, Any], source: str
) -> AnySection:
    """Validate the fields of a recipe or section; `source` is named in the error.

    Raises:
        RecipeError: a field is unknown or out of range.
    """
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise RecipeError(f"{source}: {one_line(error)}") from error


def override_recipe(
    recipe: AnySection,
    overrides: Mapping[str, Any],
    flags: Mapping[str, str] | None = None,
) -> AnySection:
    """Replace fields named by dotted paths (`calibration.seed`); None leaves as is.

    Args:
        recipe: stays as it is.
        overrides: values by the paths of their fields.
        flags: what a user has typed to set a field, by its path; errors name that.

    Raises:
        RecipeError: a value is out of range, or a path leads nowhere.
    """
    content = recipe.model_dump()
    for dotted, value in overrides.items():
        if value is None:
            continue
        *sections, field = dotted.split(".")
        section = content
        for name in sections:
            if not isinstance(section.get(name), dict):
                raise RecipeError(f"{dotted}: recipes have no section {name!r}")
            section = section[name]
        section[field] = value
    try:
        return type(recipe).model_validate(content)
    except ValidationError as error:
        raise RecipeError(f"options: {one_line(error, flags)}") from error


def published_choices(
    recipe: Section, leave_out: Collection[str] = ()
) -> dict[str, Any]:
    """A recipe as a checkpoint tells it: calibration files without their folders."""
    content = recipe.model_dump(mode="json", exclude=set(leave_out))
    sources = content["calibration"]["sources"]
    content["calibration"]["sources"] = [Path(source).name for source in sources]
    return content


def one_line(error: ValidationError, names: Mapping[str, str] | None = None) -> str:
    """A pydantic error as one line: every field, or its name, with what is wrong."""
    parts = []
    for fault in error.errors():
        field = ".".join(map(str, fault["loc"]))
        field = (names or {}).get(field, field)
        reason = fault["msg"].removeprefix("Value error, ")
        parts.append(f"{field}: {reason}" if field else reason)
    return "; ".join(dict.fromkeys(parts))
