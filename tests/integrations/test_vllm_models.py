"""Models of several families: vLLM says what Transformers says."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("vllm", reason="vLLM is not installed")

import tacq_vllm.integrations.transformers  # noqa: F401
from tacq_vllm.format.checkpoint import read_schema
from tacq_vllm.format.inspection import inspect_checkpoint
from tacq_vllm.format.layouts import linear_specs
from tacq_vllm.format.validation import find_faults
from tests.builders import rewrite_schema, rewrite_tensors, stored_weights
from tests.integrations.asking import Answer, Worker, transformers_tokens
from tests.integrations.conftest import FAMILIES, FamilyCheckpoint
from tests.integrations.vllm_worker import NEW_TOKENS

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

EXPERTS = {"mixtral-TaCQ-w3", "qwen3_moe-TaCQ-w3"}


def assert_agree(answer: Answer, checkpoint: Path) -> None:
    assert answer.tokens == transformers_tokens(checkpoint)
    assert {len(tokens) for tokens in answer.tokens} == {NEW_TOKENS}
    # One token over and over would agree too.
    assert len({token for tokens in answer.tokens for token in tokens}) > 10
    # Once, however many processes there are.
    (line,) = answer.log_lines
    figures = inspect_checkpoint(checkpoint)
    start = (
        f"{checkpoint.name}: 3 bits, group 32, "
        f"{100 * figures.outliers / figures.weights:.2f} % kept, "
        f"{figures.effective_bits:.2f} effective bits, kernel "
    )
    assert start in line
    assert ("experts not quantized" in line) == (checkpoint.name in EXPERTS)


@pytest.mark.parametrize("family", FAMILIES)
def test_vllm_says_what_transformers_says(
    serve: Worker, family_checkpoint: FamilyCheckpoint, family: str
):
    checkpoint = family_checkpoint(family)
    assert_agree(serve(checkpoint), checkpoint)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_the_transformers_backend_of_vllm(
    serve: Worker, family_checkpoint: FamilyCheckpoint, family: str
):
    checkpoint = family_checkpoint(family)
    assert_agree(serve(checkpoint, model_impl="transformers"), checkpoint)


@pytest.mark.skipif(os.cpu_count() == 1, reason="each rank needs a core")
@pytest.mark.parametrize("family", ["qwen2", "gemma3", "phi3"])
def test_two_ranks_say_the_same(
    serve: Worker, family_checkpoint: FamilyCheckpoint, family: str
):
    checkpoint = family_checkpoint(family)
    assert_agree(serve(checkpoint, tensor_parallel_size=2), checkpoint)


def leave_out(folder: Path, names: list[str]) -> None:
    """Make some linears of a checkpoint as if they had never been quantized."""
    schema = read_schema(folder)
    stored = stored_weights(folder)
    weights = {f"{name}.weight": stored[name].to(torch.bfloat16) for name in names}

    def change(tensors: dict[str, Tensor]) -> None:
        for name in names:
            for suffix in linear_specs(schema, name):
                del tensors[f"{name}.{suffix}"]
        tensors.update(weights)

    rewrite_tensors(folder, change)
    counts = schema.circuits["default"]
    rewrite_schema(
        folder,
        linears={n: s for n, s in schema.linears.items() if n not in names},
        circuits={"default": {n: c for n, c in counts.items() if n not in names}},
    )


def test_linears_left_in_16_bits(
    serve: Worker, family_checkpoint: FamilyCheckpoint, tmp_path: Path
):
    checkpoint = tmp_path / "copy"
    shutil.copytree(family_checkpoint("llama"), checkpoint)
    leave_out(
        checkpoint,
        [
            "model.layers.0.self_attn.o_proj",
            "model.layers.1.mlp.down_proj",
            *(f"model.layers.1.self_attn.{part}_proj" for part in "qkv"),
        ],
    )
    assert find_faults(checkpoint) == []
    assert len(read_schema(checkpoint).linears) == 14 - 5
    assert_agree(serve(checkpoint), checkpoint)
