"""Models of several families: vLLM says what Transformers says."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

pytest.importorskip("vllm", reason="vLLM is not installed")

import tacq_vllm.integrations.transformers  # noqa: F401
from tacq_vllm.format.checkpoint import CheckpointReader, read_schema
from tacq_vllm.format.inspection import inspect_checkpoint
from tacq_vllm.format.linear import tensor_names
from tacq_vllm.format.validation import find_faults, load_linear
from tacq_vllm.kernels.reference import dequantize
from tests.builders import rewrite_schema, rewrite_tensors
from tests.conftest import VOCAB_SIZE
from tests.integrations.conftest import FAMILIES, FamilyCheckpoint
from tests.integrations.vllm_worker import NEW_TOKENS
from tests.serving import ENVIRONMENT

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

EXPERTS = {"mixtral-TaCQ-w3", "qwen3_moe-TaCQ-w3"}
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Answer:
    """What vLLM says."""

    tokens: list[list[int]]
    """New ones, of each prompt."""
    log_lines: list[str]
    """Those of the plugin."""


Serve = Callable[..., Answer]


def make_prompts() -> list[list[int]]:
    """Prompts of random tokens: one token, a few, more than a sliding window."""
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist()
        for length in range(1, 37, 3)
    ]


@pytest.fixture(scope="module")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    """Ask vLLM for the greedy tokens that follow the prompts."""
    folder = tmp_path_factory.mktemp("vllm")
    answers, log = folder / "answers", folder / "log"
    with (
        log.open("wb") as output,
        subprocess.Popen(
            [sys.executable, "-m", "tests.integrations.vllm_worker"],
            cwd=ROOT,
            env=ENVIRONMENT | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=output,
            text=True,
        ) as worker,
    ):

        def ask(checkpoint: Path, **options: Any) -> Answer:
            logged = log.stat().st_size
            request = {
                "folder": str(checkpoint),
                "options": options,
                "prompts": make_prompts(),
                "answers": str(answers),
            }
            worker.stdin.write(json.dumps(request) + "\n")
            worker.stdin.flush()
            assert worker.stdout.readline() == "0\n", log.read_text()[-4000:]
            lines = log.read_text()[logged:].splitlines()
            return Answer(
                json.loads(answers.read_text()),
                [line for line in lines if "] tacq: " in line],
            )

        yield ask


def transformers_tokens(checkpoint: Path) -> list[list[int]]:
    """The greedy tokens that follow the prompts, from the packed weights."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    new = []
    for prompt in make_prompts():
        tokens = torch.tensor([prompt])
        out = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
        )
        new.append(out[0, len(prompt) :].tolist())
    return new


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
    serve: Serve, family_checkpoint: FamilyCheckpoint, family: str
):
    checkpoint = family_checkpoint(family)
    assert_agree(serve(checkpoint), checkpoint)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_the_transformers_backend_of_vllm(
    serve: Serve, family_checkpoint: FamilyCheckpoint, family: str
):
    checkpoint = family_checkpoint(family)
    assert_agree(serve(checkpoint, model_impl="transformers"), checkpoint)


@pytest.mark.skipif(os.cpu_count() == 1, reason="each rank needs a core")
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3", "phi3"])
def test_two_ranks_say_the_same(
    serve: Serve, family_checkpoint: FamilyCheckpoint, family: str
):
    checkpoint = family_checkpoint(family)
    assert_agree(serve(checkpoint, tensor_parallel_size=2), checkpoint)


def leave_out(folder: Path, names: list[str]) -> None:
    """Make some linears of a checkpoint as if they had never been quantized."""
    schema = read_schema(folder)
    with CheckpointReader(folder) as reader:
        weights = {
            f"{name}.weight": dequantize(
                load_linear(reader, schema, name), torch.bfloat16
            )
            for name in names
        }

    def change(tensors: dict[str, Tensor]) -> None:
        for name in names:
            for suffix in tensor_names(schema.bits):
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
    serve: Serve, family_checkpoint: FamilyCheckpoint, tmp_path: Path
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
