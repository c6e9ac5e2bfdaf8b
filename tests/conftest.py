import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.trainers import WordLevelTrainer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tacq_vllm.config import CalibrationConfig, GptqConfig, Recipe
from tacq_vllm.hub import write_model_card
from tacq_vllm.quantize.model import BaseModel, load_base_model
from tacq_vllm.quantize.pipeline import quantize_model
from tacq_vllm.quantize.progress import Progress
from tacq_vllm.quantize.workdir import WorkDir

settings.register_profile("tacq", deadline=None, derandomize=True, max_examples=25)
settings.load_profile("tacq")

# On tiny tensors threads mostly wait for each other.
torch.set_num_threads(1)

VOCAB_SIZE = 128


def make_text(sentences: int = 200) -> str:
    """Sentences of some sixty words, always the same."""
    choose = random.Random(0).choice
    adjectives = "small large old new quiet loud green blue bright slow".split()
    nouns = "river city garden teacher bridge market forest window train song".split()
    verbs = "follows finds builds crosses watches keeps sells opens draws".split()
    adverbs = "slowly again today early together never often here".split()
    return " ".join(
        f"the {choose(adjectives)} {choose(nouns)} {choose(verbs)} "
        f"a {choose(nouns)} {choose(adverbs)} ."
        for _ in range(sentences)
    )


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are the words of `make_text`."""
    tokenizer = Tokenizer(WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    trainer = WordLevelTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=["<unk>", "<s>", "</s>"]
    )
    tokenizer.train_from_iterator([make_text()], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
    )


TinyLlama = Callable[..., Path]


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> TinyLlama:
    """Save a random Llama of a given type with a tokenizer; give its folder."""

    def make(dtype: torch.dtype = torch.float32, **overrides: Any) -> Path:
        config = {
            "vocab_size": VOCAB_SIZE,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "initializer_range": 0.1,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**(config | overrides))).to(dtype)
        folder = tmp_path_factory.mktemp("model") / "tiny-llama"
        model.save_pretrained(folder)
        make_tokenizer().save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def tiny_model(tiny_llama: TinyLlama) -> Path:
    """Folder of a random Llama in bfloat16."""
    return tiny_llama(torch.bfloat16)


@pytest.fixture(scope="session")
def tiny_base(tiny_model: Path) -> BaseModel:
    """The tiny model, loaded; tests leave it as it is."""
    return load_base_model(str(tiny_model), torch.device("cpu"))


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text to calibrate on."""
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text(make_text())
    return path


@pytest.fixture(scope="session")
def tiny_recipe(text_file: Path) -> Recipe:
    """3 bits, and as little work as possible."""
    return Recipe(
        bits=3,
        group_size=32,
        calibration=CalibrationConfig(
            sources=(str(text_file),), num_samples=8, seq_len=32
        ),
        gptq=GptqConfig(grid_steps=20),
    )


def run_pipeline(base: BaseModel, recipe: Recipe, output: Path, work_dir: Path) -> None:
    """Quantize as the command line does."""
    quantize_model(
        base,
        recipe,
        output,
        WorkDir(work_dir),
        Progress(),
        lambda folder, schema: write_model_card(folder, schema, base.name),
    )


@pytest.fixture(scope="session")
def tiny_checkpoint(
    tiny_base: BaseModel, tiny_recipe: Recipe, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A whole checkpoint of the tiny model; tests change copies of it only."""
    folder = tmp_path_factory.mktemp("checkpoint")
    run_pipeline(tiny_base, tiny_recipe, folder / "tiny", folder / "work")
    return folder / "tiny"


@pytest.fixture
def checkpoint_copy(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint to damage."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "copy"))
