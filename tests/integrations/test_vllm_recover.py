"""A trained checkpoint in vLLM: it says what the model said that was trained."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed")

from tacq_vllm.config import CalibrationConfig
from tacq_vllm.format.checkpoint import read_schema
from tacq_vllm.quantize.progress import Progress
from tacq_vllm.quantize.workdir import WorkDir
from tacq_vllm.recover import pipeline, trainer
from tacq_vllm.recover.config import RecoverConfig
from tacq_vllm.recover.student import Student
from tests.integrations.asking import Worker, greedy_tokens
from tests.integrations.conftest import FamilyCheckpoint

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


def test_vllm_says_what_was_trained(
    serve: Worker,
    family_checkpoint: FamilyCheckpoint,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    checkpoint = family_checkpoint("llama")
    students: list[Student] = []

    class Kept(trainer.Trainer):
        def __init__(self, student: Student, *args: object, **kwargs: object) -> None:
            students.append(student)
            super().__init__(student, *args, **kwargs)

    monkeypatch.setattr(pipeline, "Trainer", Kept)
    pipeline.recover_checkpoint(
        checkpoint,
        str(checkpoint.parent / "model"),
        RecoverConfig(
            calibration=CalibrationConfig(
                sources=(str(text_file),), num_samples=16, seq_len=32
            ),
            budget=8,
            budget_unit="steps",
            batch_tokens=128,
            evaluate_every=8,
            magnitude_lr=1e-2,
            lora_lr=5e-2,
            train_outliers=True,
            precision="fp32",
        ),
        tmp_path / "recovered",
        torch.device("cpu"),
        WorkDir(tmp_path / "work"),
        Progress(),
        lambda folder, schema: None,
    )

    answer = serve(tmp_path / "recovered")

    model = students[0].model
    # Blocks that run a second time in the backward pass keep no cache.
    model.generation_config.use_cache = False
    # In float32 they are equal, but for the order of sums.
    assert answer.tokens == greedy_tokens(model)
    assert answer.tokens != serve(checkpoint).tokens
    assert "recover" in read_schema(tmp_path / "recovered").recipe
