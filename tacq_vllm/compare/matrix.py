"""Which models are compared: every combination of some choices."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field

from tacq_vllm.config import (
    OWN_GROUPS,
    Method,
    Recipe,
    RecipeError,
    SaliencyMetric,
    override_recipe,
)

METHODS: tuple[str, ...] = get_args(Method)
SALIENCIES: tuple[str, ...] = get_args(SaliencyMetric)


class Cell(BaseModel):
    """One quantized model of the matrix."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: str = Field(
        description="Of recipes, or the saliency with which `tacq` keeps weights."
    )
    bits: int = Field(description="Of a code.")
    group_size: int = Field(description="Columns that share a scale; -1: the row.")
    calibration: str = Field(description="What it is calibrated on.")
    seed: int = Field(description="Of the calibration's sampling.")
    options: str = Field(
        "", description="Recipe fields set beyond that: `field=value`, with spaces."
    )

    @property
    def setting(self) -> tuple[Any, ...]:
        """All but the seed."""
        source = Path(self.calibration).name
        return (self.bits, self.group_size, source, self.options, self.method)

    def recipe(self, base: Recipe) -> Recipe:
        """The recipe that makes it.

        Raises:
            RecipeError: the choices do not fit together.
        """
        is_method = self.method in METHODS
        fields: dict[str, Any] = {
            "method": self.method if is_method else "tacq",
            "outliers.saliency": self.method if self.method in SALIENCIES else None,
            "bits": self.bits,
            "group_size": None if self.method in OWN_GROUPS else self.group_size,
            "calibration.sources": [self.calibration],
            "calibration.seed": self.seed,
        }
        for option in self.options.split():
            name, _, value = option.partition("=")
            fields[name] = _parse_value(option, value)
        return override_recipe(base, fields, _FLAGS)


_FLAGS = {
    "method": "--methods",
    "bits": "--bits",
    "group_size": "--group-size",
    "outliers.saliency": "--methods",
    "calibration.sources": "--calibration",
    "calibration.seed": "--seeds",
    "calibration.num_samples": "--num-samples",
    "calibration.seq_len": "--seq-len",
}
"""What chooses fields that tell models, or comparisons, apart."""


@dataclass(frozen=True)
class Matrix:
    """The choices that are combined."""

    methods: Sequence[str]
    bits: Sequence[int]
    group_sizes: Sequence[int]
    calibrations: Sequence[str]
    seeds: Sequence[int]
    options: str

    def cells(self, base: Recipe) -> list[Cell]:
        """Every combination once; those of a seed follow each other.

        Methods with groups of their own are combined with no others.

        Args:
            base: the recipe of which cells change some fields.

        Raises:
            RecipeError: a choice is none that recipes know, or does not fit another.
        """
        self._check_options()
        for method in self.methods:
            if method not in METHODS and method not in SALIENCIES:
                known = ", ".join(dict.fromkeys(METHODS + SALIENCIES))
                raise RecipeError(f"{method}: no such method; there are {known}")
        sources = Counter(Path(source).name for source in set(self.calibrations))
        for name, count in sources.items():
            if count > 1:
                raise RecipeError(
                    f"--calibration: {count} sources are called {name}, which is what "
                    "tells them apart: rename one"
                )
        # Neighbours share gradients, and the pass without kept weights.
        axes = (self.seeds, self.calibrations, self.bits, self.group_sizes)
        asked = (
            Cell(
                method=method,
                bits=bits,
                group_size=group_size,
                calibration=calibration,
                seed=seed,
                options=self.options,
            )
            for seed, calibration, bits, group_size in product(*axes)
            for method in self.methods
        )
        cells = [
            cell.model_copy(update={"group_size": cell.recipe(base).own_group_size})
            for cell in asked
        ]
        if not cells:
            raise RecipeError("nothing to compare: of some choice there is none")
        return list(dict.fromkeys(cells))

    def _check_options(self) -> None:
        for option in self.options.split():
            name, equals, _ = option.partition("=")
            if not equals:
                raise RecipeError(f"--option {option}: give it as FIELD=VALUE")
            for field, flag in _FLAGS.items():
                if field == name or field.startswith(f"{name}."):
                    raise RecipeError(f"--option {option}: use {flag}")


def _parse_value(option: str, text: str) -> Any:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"--option {option}: the value is not YAML") from error
    if value is None:
        raise RecipeError(f"--option {option}: a value is missing")
    return value
