"""Small trainings."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tacq_vllm.config import CalibrationConfig, override_recipe
from tacq_vllm.hub import rewrite_model_card
from tacq_vllm.quantize.progress import Listener, Progress
from tacq_vllm.quantize.workdir import WorkDir
from tacq_vllm.recover.config import RecoverConfig
from tacq_vllm.recover.pipeline import recover_checkpoint

STEPS = 6

Run = Callable[..., Path]
"""Trains a checkpoint and gives the folder that comes of it."""


@pytest.fixture(scope="session")
def tiny_training(text_file: Path) -> RecoverConfig:
    """A few steps on short windows, at learning rates for a tiny model."""
    return RecoverConfig(
        calibration=CalibrationConfig(
            sources=(str(text_file),), num_samples=16, seq_len=32
        ),
        budget=STEPS,
        budget_unit="steps",
        batch_tokens=128,
        micro_tokens=64,
        evaluate_every=2,
        magnitude_lr=1e-2,
        lora_lr=1e-2,
        precision="fp32",
    )


def train(
    checkpoint: Path,
    base: Path | None,
    config: RecoverConfig,
    output: Path,
    work: Path,
    listener: Listener | None = None,
    **choices: Any,
) -> Path:
    """Train as the command line does."""
    recover_checkpoint(
        checkpoint,
        str(base) if base else None,
        override_recipe(config, choices),
        output,
        torch.device("cpu"),
        WorkDir(work),
        Progress(listener),
        lambda folder, schema: rewrite_model_card(folder, schema, checkpoint),
    )
    return output


@pytest.fixture
def run(tiny_model: Path, tiny_training: RecoverConfig, tmp_path: Path) -> Run:
    """Training towards the tiny model, with one work folder."""

    def train_it(
        checkpoint: Path,
        listener: Listener | None = None,
        base: Path | None = tiny_model,
        name: str = "out",
        **choices: Any,
    ) -> Path:
        output, work = tmp_path / name, tmp_path / "work"
        return train(checkpoint, base, tiny_training, output, work, listener, **choices)

    return train_it
