"""Train a LoRA adapter for a task on top of the packed weights.

    python examples/train_lora.py CHECKPOINT TASK.jsonl ADAPTER [--steps N]

A line of TASK.jsonl has a `prompt` and its `completion`; the loss is that of the
completion. ADAPTER is an ordinary one of PEFT:

    vllm serve CHECKPOINT --enable-lora --lora-modules task=ADAPTER

serves both, the adapter by the model name `task`.
"""

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import tacq_vllm.integrations.transformers  # noqa: F401 - registers the format
from tacq_vllm.integrations.peft import with_packed_linears

NOT_SCORED = -100
"""The label of a token that does not count in the loss of Transformers."""


def main() -> None:
    """Train, save, print the loss of the first and of the last round."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("task", type=Path)
    parser.add_argument("adapter", type=Path)
    parser.add_argument(
        "--steps", type=int, default=200, help="one line of the task each"
    )
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    arguments = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(arguments.checkpoint)
    lines = arguments.task.read_text(encoding="utf-8").splitlines()
    samples = [encode(json.loads(line), tokenizer) for line in lines]
    # On many CPUs products in bfloat16, the stored type, are slow.
    dtype = torch.float32
    model = AutoModelForCausalLM.from_pretrained(arguments.checkpoint, dtype=dtype)
    config = LoraConfig(
        r=8, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM"
    )
    model = get_peft_model(model, with_packed_linears(config))

    before = mean_loss(model, samples)
    train(model, samples, arguments.steps, arguments.learning_rate)
    model.save_pretrained(arguments.adapter)
    print(f"loss {before:.3f} before, {mean_loss(model, samples):.3f} after")


def encode(line: dict[str, str], tokenizer: Any) -> dict[str, Tensor]:
    """Tokens of a prompt and its completion [1, n], and labels for the latter."""
    prompt = tokenizer(line["prompt"]).input_ids
    completion = tokenizer(line["completion"], add_special_tokens=False).input_ids
    labels = [NOT_SCORED] * len(prompt) + completion
    return {
        "input_ids": torch.tensor([prompt + completion]),
        "labels": torch.tensor([labels]),
    }


def train(
    model: torch.nn.Module,
    samples: list[dict[str, Tensor]],
    steps: int,
    learning_rate: float,
) -> None:
    """Change the adapter alone: the packed weights have no gradients."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate)
    model.train()
    for sample in itertools.islice(itertools.cycle(samples), steps):
        model(**sample).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def mean_loss(model: torch.nn.Module, samples: list[dict[str, Tensor]]) -> float:
    """The loss of a completion's token, averaged over the lines."""
    model.eval()
    return sum(model(**sample).loss.item() for sample in samples) / len(samples)


if __name__ == "__main__":
    main()
