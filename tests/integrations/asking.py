"""Asking vLLM in processes of its own, and Transformers for what it should say."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import tacq_vllm.integrations.transformers  # noqa: F401
from tests import forking
from tests.conftest import VOCAB_SIZE
from tests.integrations.vllm_worker import NEW_TOKENS
from tests.serving import ENVIRONMENT

ROOT = Path(__file__).parents[2]


def make_prompts() -> list[list[int]]:
    """20 prompts of random tokens: one token, a few, more than a sliding window."""
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist()
        for length in range(1, 41, 2)
    ]


@dataclass(frozen=True)
class Answer:
    """What vLLM says."""

    code: int
    """Exit code of its process."""
    file: Path
    """What it was asked for."""
    log: str

    @property
    def tokens(self) -> list[list[int]]:
        """The new ones, of each prompt."""
        assert self.code == 0, self.log[-4000:]
        tokens: list[list[int]] = json.loads(self.file.read_text())
        return tokens

    @property
    def log_lines(self) -> list[str]:
        """Those of the plugin."""
        return [line for line in self.log.splitlines() if "] tacq: " in line]

    def count(self, counter: str) -> int:
        """What one of vLLM's counters says, when the tokens are made."""
        found = re.search(rf"^vllm:{counter} (\d+)$", self.log, re.MULTILINE)
        assert found is not None, self.log[-4000:]
        return int(found[1])


class Worker:
    """The program that runs vLLM; files and log go to a folder."""

    def __init__(self, process: "subprocess.Popen[str]", folder: Path) -> None:
        self._process = process
        self._folder = folder
        self._count = 0

    def __call__(self, checkpoint: Path, **options: Any) -> Answer:
        """Ask for the greedy tokens that follow the prompts."""
        return self.ask("generate", checkpoint, options)

    def ask_adapter(self, checkpoint: Path, adapter: Path) -> Answer:
        """Ask with a LoRA adapter of rank 8 on top."""
        options = {"enable_lora": True, "max_lora_rank": 8}
        return self.ask("generate", checkpoint, options, adapter=str(adapter))

    def ask(
        self,
        function: str,
        checkpoint: Path,
        options: dict[str, Any],
        **arguments: Any,
    ) -> Answer:
        """Ask a function of `vllm_worker`; options are those of `vllm.LLM`."""
        self._count += 1
        log, file = self._folder / "log", self._folder / f"answer{self._count}"
        logged = log.stat().st_size
        request = {
            "function": function,
            "folder": str(checkpoint),
            "options": options,
            "prompts": make_prompts(),
            "answers": str(file),
            **arguments,
        }
        code = forking.ask(self._process, **request)
        return Answer(code, file, log.read_bytes()[logged:].decode())


@contextmanager
def vllm_worker(
    folder: Path, environment: dict[str, str] = ENVIRONMENT
) -> Iterator[Worker]:
    """Start vLLM, to be asked."""
    with (
        (folder / "log").open("wb") as log,
        subprocess.Popen(
            [sys.executable, "-m", "tests.integrations.vllm_worker"],
            cwd=ROOT,
            env=environment | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        ) as process,
    ):
        yield Worker(process, folder)


def transformers_tokens(checkpoint: Path) -> list[list[int]]:
    """The greedy tokens that follow the prompts, from the packed weights."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    return greedy_tokens(model)


def greedy_tokens(model: Any) -> list[list[int]]:
    """The greedy tokens that follow the prompts, from a model of Transformers."""
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


def adapted_tokens(checkpoint: Path, adapter: Path) -> list[list[int]]:
    """Make an adapter on packed linears, its values random, so that it changes much.

    Gives the greedy tokens that follow the prompts, from it on the dequantized model.
    """
    import peft

    from tacq_vllm.integrations.peft import with_packed_linears

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=8, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False
    )
    peft.get_peft_model(model, with_packed_linears(config)).save_pretrained(adapter)
    dense = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    return greedy_tokens(peft.PeftModel.from_pretrained(dense.dequantize(), adapter))
