"""Sections of a recipe for the methods that TaCQ is compared with.

What they leave open is as in their papers, or as the TaCQ paper (arXiv 2504.07389,
section 4) set it to compare with them.
"""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    """A part of a recipe: frozen, and without fields that nobody reads."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class SqueezeLlmConfig(Section):
    """SqueezeLLM (arXiv 2306.07629): a table of values per row."""

    sensitive_ratio: float = Field(
        0.0005,
        ge=0.0,
        lt=1.0,
        description="Share of each linear's weights kept for their Fisher information "
        "(section 4.2).",
    )
    outlier_ratio: float = Field(
        0.0045,
        ge=0.0,
        lt=1.0,
        description="Share of all weights kept for their size, as multiples of their "
        "linear's interquartile range (section 4.2).",
    )
    iterations: int = Field(
        50, ge=1, description="Of k-means, from each start (reference code)."
    )


class SpqrConfig(Section):
    """SpQR (arXiv 2306.03078): small groups, quantized statistics, outliers."""

    code_bits: Literal[1, 2, 3, 4] | None = Field(
        None,
        description="Bits of a code. None: one less than the recipe's `bits`, as the "
        "TaCQ paper compares, for statistics and outliers take up the bit.",
    )
    group_size: int = Field(
        16, ge=2, description="Input columns that share a scale (section 4.2)."
    )
    statistics_bits: int = Field(
        3, ge=1, le=8, description="Bits of a scale and of a zero-point (section 4.2)."
    )
    statistics_group_size: int = Field(
        16, ge=2, description="Rows whose scales and zero-points share a grid."
    )
    outlier_ratio: float = Field(
        0.016,
        ge=0.0,
        lt=0.5,
        description="Share of a linear's weights kept, for which a threshold is "
        "searched; the default is what the TaCQ paper's average bits amount to.",
    )
    outlier_threshold: float | None = Field(
        None,
        gt=0.0,
        description="Or the threshold itself: squared error over the mean variance of "
        "a column, both in the Hessian's measure. Paper: 0.2, for 4 bits.",
    )
    damp_percent: float = Field(
        1.0,
        gt=0.0,
        le=1.0,
        description="Share of the Hessian's mean diagonal added (reference code).",
    )


class FineqConfig(Section):
    """FineQ (arXiv 2504.19746): clusters of three weights, outliers with more bits."""

    rounding: Literal["nearest", "gptq"] = Field(
        "nearest",
        description="Each weight by itself, without any text (paper), or so that later "
        "columns make up for errors.",
    )
    keep_outliers: bool = Field(
        False,
        description="Keep weights in 16 bits beside the clusters, as `outliers` says: "
        "TaCQ on this layout. Paper: false.",
    )


class SlimLlmConfig(Section):
    """SliM-LLM (arXiv 2405.14917): bits by group. Its groups are `group_size`."""

    salience_weight: float = Field(
        1.0,
        gt=0.0,
        description="Weight of salient elements' errors where a grid is searched "
        "(reference code, lambda_salience).",
    )
    salience_deviations: float = Field(
        2.0,
        gt=0.0,
        description="Elements are salient so many standard deviations off the mean.",
    )
    search_range: float = Field(
        0.1, ge=0.0, lt=1.0, description="A grid's range is changed by so much at most."
    )
    search_steps: int = Field(
        50, ge=1, description="Ranges tried above one, and as many below."
    )
    search_tokens: int = Field(
        4096,
        ge=1,
        description="Tokens of the calibration text, evenly spread, on which the "
        "numbers of wide and narrow groups are compared. Reference code: all.",
    )
