"""A small Llama that has learned a text, so that what it says is varied."""

import json
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.conftest import SIZES

QUESTIONS = Path(__file__).parents[2] / "examples/data/questions.jsonl"
STEPS = 250
BATCH_SIZE = 8
SEQ_LEN = 64
LEARNING_RATE = 3e-3


def questions() -> list[tuple[str, str]]:
    """The questions of the examples, with their answers."""
    rows = [json.loads(line)["messages"] for line in QUESTIONS.read_text().splitlines()]
    return [(question["content"], answer["content"]) for question, answer in rows]


def train_llama(text: str, folder: Path) -> Path:
    """Train a Llama of 8 heads, 4 of k and v, on a text; give its folder."""
    tokenizer = _make_tokenizer(text)
    config = LlamaConfig(
        **SIZES
        | {
            "vocab_size": len(tokenizer),
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 32,
            "initializer_range": 0.02,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        }
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=STEPS
    )
    tokens = torch.tensor(tokenizer(text).input_ids)
    for _ in range(STEPS):
        starts = torch.randint(len(tokens) - SEQ_LEN, (BATCH_SIZE, 1))
        batch = tokens[starts + torch.arange(SEQ_LEN)]
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _make_tokenizer(text: str) -> PreTrainedTokenizerFast:
    """A tokenizer of the pieces of words that a text has."""
    pieces = ByteLevelBPETokenizer()
    pieces.train_from_iterator(
        [text], vocab_size=768, special_tokens=["<s>", "</s>"], show_progress=False
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=pieces._tokenizer, bos_token="<s>", eos_token="</s>"
    )
