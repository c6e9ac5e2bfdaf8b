"""Everything that decides how a checkpoint is trained."""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from tacq_vllm.config import CalibrationConfig, parse_section, read_yaml
from tacq_vllm.config_methods import Section

Trained = Literal["magnitude", "lora", "both"]
Precision = Literal["auto", "bf16", "fp32"]


class RecoverConfig(Section):
    """All that `tacq recover` needs to know beside the checkpoint and its base."""

    train: Trained = Field(
        "both",
        description="What is trained: the magnitude of each group's scale, low-rank "
        "updates of the weights inside the quantizer, or both (DL-QAT).",
    )
    train_outliers: bool = Field(
        False, description="Train the weights kept in 16 bits, too. Paper: none kept."
    )
    rank: int = Field(4, ge=1, description="Rank of A and B.")
    alpha: float = Field(
        4.0,
        gt=0.0,
        description="The update is alpha / rank · B·A, in mean scales of its linear, "
        "so that one learning rate serves small and large weights.",
    )
    margin: float = Field(
        0.25,
        ge=0.0625,
        le=0.5,
        description="Where the latent weights start: as near to the base model's as "
        "the stored codes allow, but this share of a step away from the next code. "
        "0.5: in the middle of their codes.",
    )
    magnitude_lr: float = Field(
        2e-3, gt=0.0, description="Highest learning rate of the magnitudes (near 1)."
    )
    lora_lr: float = Field(
        5e-3, gt=0.0, description="Highest learning rate of A and B."
    )
    outlier_lr: float = Field(
        1e-4, gt=0.0, description="Highest learning rate of the kept weights."
    )
    warmup: float = Field(
        0.05,
        ge=0.0,
        lt=1.0,
        description="Share of the budget in which the learning rates rise; then they "
        "fall along a cosine.",
    )
    final_lr: float = Field(
        0.1,
        ge=0.0,
        le=1.0,
        description="Last learning rate, as a share of the highest.",
    )
    clip_norm: float = Field(
        1.0, gt=0.0, description="The gradient is scaled down to this norm."
    )
    budget: float = Field(
        1.0, gt=0.0, allow_inf_nan=False, description="How long to train, at most."
    )
    budget_unit: Literal["steps", "epochs", "minutes"] = Field(
        "epochs",
        description="Unit of the budget; minutes are those of training and of the "
        "16-bit model's pass before it.",
    )
    batch_tokens: int = Field(
        1024, ge=1, description="Tokens of a step; whole samples, one in any case."
    )
    micro_tokens: int = Field(
        2048, ge=1, description="Tokens that go through the model at once."
    )
    distill: float = Field(
        0.5,
        ge=0.0,
        le=1.0,
        description="Share of the loss that is the divergence from the 16-bit model's "
        "predictions; the rest is the cross-entropy of the text. 0 without a base.",
    )
    temperature: float = Field(
        1.0, gt=0.0, description="Of both models' predictions in the divergence."
    )
    held_out: float = Field(
        0.05,
        gt=0.0,
        lt=1.0,
        description="Share of the samples that are not trained on, but for one at "
        "least: by their loss the best state is chosen.",
    )
    evaluate_every: int = Field(
        20, ge=1, description="Steps between two looks at the held-out loss."
    )
    patience: int = Field(
        5, ge=1, description="Looks without a better held-out loss that end training."
    )
    precision: Precision = Field(
        "auto",
        description="Type of the products; auto: bf16 on GPUs and on CPUs with AMX or "
        "AVX512-BF16, where it is faster. Sums, norms and the trained values are in "
        "float32.",
    )
    gradient_checkpointing: bool = Field(
        True,
        description="Compute each decoder block a second time instead of remembering "
        "its activations.",
    )
    seed: int = Field(
        0, ge=0, description="Of A's first values and the samples' order."
    )
    calibration: CalibrationConfig = CalibrationConfig()

    @model_validator(mode="after")
    def _check_budget(self) -> Self:
        if self.budget_unit == "steps" and self.budget != int(self.budget):
            raise ValueError(f"budget: {self.budget} steps is not a whole number")
        return self

    @property
    def trains_magnitude(self) -> bool:
        """Whether group magnitudes are trained."""
        return self.train in ("magnitude", "both")

    @property
    def trains_lora(self) -> bool:
        """Whether low-rank updates are trained."""
        return self.train in ("lora", "both")


def load_recover_config(path: Path) -> RecoverConfig:
    """Load the YAML file of a training recipe.

    Raises:
        RecipeError: it cannot be read, or is not valid.
    """
    return parse_section(RecoverConfig, read_yaml(path), source=str(path))
