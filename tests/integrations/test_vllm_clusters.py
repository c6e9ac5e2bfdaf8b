"""A checkpoint in FineQ's layout: vLLM says what Transformers says."""

from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from tacq_vllm.format.inspection import inspect_checkpoint
from tests.integrations.asking import Worker, adapted_tokens, transformers_tokens
from tests.integrations.conftest import FamilyCheckpoint

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


@pytest.fixture(scope="module")
def checkpoint(family_checkpoint: FamilyCheckpoint) -> Path:
    fields = {"fineq.rounding": "gptq", "fineq.keep_outliers": True}
    return family_checkpoint("qwen2", method="fineq", bits=2, group_size=-1, **fields)


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> list[list[int]]:
    return transformers_tokens(checkpoint)


def test_the_same_tokens(
    serve: Worker, checkpoint: Path, expected: list[list[int]]
) -> None:
    answer = serve(checkpoint)

    assert answer.tokens == expected
    # One token over and over would agree too.
    assert len({token for tokens in expected for token in tokens}) > 10
    figures = inspect_checkpoint(checkpoint)
    (line,) = answer.log_lines
    assert (
        f"qwen2-FineQ: 2.33 bits, whole rows, 0.35 % kept, "
        f"{figures.effective_bits:.2f} effective bits, kernel "
    ) in line


def test_reloaded_weights(
    serve: Worker, checkpoint: Path, expected: list[list[int]]
) -> None:
    assert serve.ask("generate", checkpoint, {}, reloads=True).tokens == expected


def test_a_lora_adapter(
    serve: Worker, checkpoint: Path, expected: list[list[int]], tmp_path: Path
) -> None:
    pytest.importorskip("peft", reason="PEFT is not installed")
    adapted = adapted_tokens(checkpoint, tmp_path)

    answer = serve.ask_adapter(checkpoint, tmp_path)

    assert answer.tokens == adapted
    assert answer.tokens != expected
