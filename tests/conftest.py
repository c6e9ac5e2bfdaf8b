import random
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.trainers import WordLevelTrainer
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from tacq_vllm.config import CalibrationConfig, GptqConfig, Recipe, override_recipe
from tacq_vllm.hub import write_model_card
from tacq_vllm.quantize.export import TIMINGS_NAME
from tacq_vllm.quantize.model import BaseModel, open_base_model
from tacq_vllm.quantize.pipeline import quantize_model
from tacq_vllm.quantize.progress import Listener, Progress
from tacq_vllm.quantize.samples import Sample
from tacq_vllm.quantize.workdir import PhaseFolder, WorkDir
from tacq_vllm.recover.curve import LOSSES_NAME, PICTURE_NAME
from tests.builders import write_lines
from tests.hub_server import Hub, hub_server

settings.register_profile("tacq", deadline=None, derandomize=True, max_examples=25)
settings.load_profile("tacq")

# On tiny tensors threads mostly wait for each other.
torch.set_num_threads(1)


VOCAB_SIZE = 128
SIZES: dict[str, Any] = {
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
"""Sizes of a tiny model, whatever its family."""


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


def make_chat_tokenizer() -> PreTrainedTokenizerFast:
    """The same tokenizer, of a model that chats."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<s> {{ m.role }} {{ m.content }} </s> {% endfor %}"
        "{% if add_generation_prompt %}<s> assistant {% endif %}"
    )
    return tokenizer


def words(tokenizer: PreTrainedTokenizerFast, tokens: Tensor) -> str:
    """The text of tokens of `make_tokenizer`."""
    return " ".join(tokenizer.convert_ids_to_tokens(tokens.tolist()))


def scored_words(tokenizer: PreTrainedTokenizerFast, sample: Sample) -> str:
    """The text of the tokens of a sample that count in the loss."""
    return words(tokenizer, sample.tokens[sample.scored])


def save_model(model: PreTrainedModel, folder: Path) -> Path:
    """Save a model with a tokenizer; give its folder."""
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def save_random(
    config: PretrainedConfig, folder: Path, dtype: torch.dtype = torch.bfloat16
) -> Path:
    """Save a model of random weights and biases, always the same."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    return save_model(model.to(dtype), folder)


TinyLlama = Callable[..., Path]


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> TinyLlama:
    """Save a random Llama of a given type with a tokenizer; give its folder."""

    def make(dtype: torch.dtype = torch.float32, **overrides: Any) -> Path:
        folder = tmp_path_factory.mktemp("model") / "tiny-llama"
        return save_random(LlamaConfig(**(SIZES | overrides)), folder, dtype)

    return make


@pytest.fixture(scope="session")
def tiny_model(tiny_llama: TinyLlama) -> Path:
    """Folder of a random Llama in bfloat16."""
    return tiny_llama(torch.bfloat16)


@pytest.fixture
def model_copy(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model to change."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


@pytest.fixture(scope="session")
def tokens() -> Tensor:
    """More tokens than the kernel for few of them serves: [2, 20]."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(VOCAB_SIZE, (2, 20), generator=generator)


@pytest.fixture(scope="session")
def tiny_base(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    """The tiny model, opened; tests leave it as it is."""
    return open_model(tiny_model, tmp_path_factory.mktemp("opened"))


@pytest.fixture
def plain_model(tiny_model: Path) -> PreTrainedModel:
    """The tiny model as Transformers loads it, whole, in float32."""
    return LlamaForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()


@pytest.fixture
def phase_folder(tmp_path: Path) -> PhaseFolder:
    """An empty folder for the files of a phase."""
    return WorkDir(tmp_path / "work").phase("test", {})


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


@pytest.fixture(scope="session")
def task_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts with completions, of many lengths."""
    path = tmp_path_factory.mktemp("task") / "task.jsonl"
    sentences = make_text().split(" . ")
    tasks = []
    for index in range(40):
        prompt = " . ".join(sentences[4 * index : 4 * index + 1 + index % 3])
        completion = f" {sentences[4 * index + 3]}"
        tasks.append({"prompt": prompt, "completion": completion})
    write_lines(path, tasks)
    return path


@pytest.fixture(scope="session")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of two named sets: four questions to calibrate on, and a text."""
    root = tmp_path_factory.mktemp("data")

    def write_problems(name: str, things: list[str]) -> None:
        problems = [
            {"question": f"the {thing}", "answer": f"a {thing} again"}
            for thing in things
        ]
        write_lines(root / "gsm8k" / name, problems)

    (root / "gsm8k").mkdir()
    shots = [f"shot {number}" for number in range(8)]
    write_problems("train.jsonl", [*shots, "river", "city", "garden", "song"])
    write_problems("dev.jsonl", ["train", "window"])
    (root / "wikitext2").mkdir()
    (root / "wikitext2" / "train.txt").write_text(make_text())
    (root / "wikitext2" / "test.txt").write_text("the loud bridge")
    return root


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    """A Hub on loopback, which holds nothing yet."""
    with hub_server() as server:
        yield server


class Recorder:
    """A listener that keeps all it is told, and may interrupt a phase at a step."""

    def __init__(self, phase: str = "", step: int = 0) -> None:
        self.phases: dict[str, int] = {}
        """Steps that each finished phase has reported."""
        self.notes: list[str] = []
        self._announced: dict[str, int] = {}
        self._done: dict[str, int] = {}
        self._stop_at = (phase, step)

    def phase_started(self, name: str, total: int) -> None:
        self._announced[name] = total
        self._done[name] = 0
        self._stop(name)

    def phase_advanced(self, name: str, steps: int, detail: str) -> None:
        self._done[name] += steps
        self._stop(name)

    def phase_finished(self, name: str, seconds: float) -> None:
        assert self._done[name] == self._announced[name]
        self.phases[name] = self._done[name]

    def noted(self, text: str) -> None:
        self.notes.append(text)

    def _stop(self, name: str) -> None:
        if (name, self._done[name]) == self._stop_at:
            raise KeyboardInterrupt


def quick(recipe: Recipe, **overrides: Any) -> Recipe:
    """A recipe changed in some fields, with as few samples as can be."""
    fields = {"calibration.num_samples": 2, "gptq.grid_steps": 4}
    return override_recipe(recipe, fields | overrides)


def open_model(model: Path, work_dir: Path) -> BaseModel:
    """Open a model as the command line does."""
    return open_base_model(str(model), torch.device("cpu"), WorkDir(work_dir))


def run_pipeline(
    base: BaseModel,
    recipe: Recipe,
    output: Path,
    work_dir: Path,
    listener: Listener | None = None,
    data_root: Path | None = None,
) -> None:
    """Quantize as the command line does."""
    quantize_model(
        base,
        recipe,
        output,
        WorkDir(work_dir),
        Progress(listener),
        lambda folder, schema: write_model_card(folder, schema, base.name),
        data_root,
    )


def random_samples(*lengths: int) -> list[Sample]:
    """Samples of random tokens, some of which do not count, always the same."""
    generator = torch.Generator().manual_seed(0)
    samples = []
    for length in lengths:
        tokens = torch.randint(VOCAB_SIZE, (length,), generator=generator)
        scored = torch.rand(length, generator=generator) < 0.5
        scored[-1] = True
        samples.append(Sample(tokens, scored))
    return samples


def assert_released(base: BaseModel) -> None:
    """Nothing is in memory, and the modules are as they were made."""
    for name, parameter in base.model.named_parameters():
        assert parameter.is_meta, name
        assert not parameter.requires_grad, name
        assert parameter.grad is None, name
    for name, module in base.model.named_modules():
        assert not module._forward_pre_hooks, name
        assert not module._forward_hooks, name
        assert "forward" not in vars(module), name


def contents(folder: Path) -> dict[str, bytes]:
    """The bytes of a checkpoint's files, but for those that tell the time."""
    timed = (TIMINGS_NAME, LOSSES_NAME, PICTURE_NAME)
    return {
        path.name: path.read_bytes()
        for path in folder.iterdir()
        if path.name not in timed
    }


def is_equal(tensors: dict[str, Tensor], others: dict[str, Tensor]) -> bool:
    """Whether both hold the same values by the same names."""
    return tensors.keys() == others.keys() and all(
        torch.equal(tensors[name], others[name]) for name in tensors
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


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Mount a file system in memory; skipped where that is not allowed."""
    mounted: list[Path] = []

    def make(*options: str) -> Path:
        folder = tmp_path / "mounted"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs"]
        result = subprocess.run(
            [*command, folder], capture_output=True, text=True, check=False
        )
        if result.returncode:
            pytest.skip(f"cannot mount: {result.stderr.strip()}")
        mounted.append(folder)
        return folder

    yield make
    for folder in mounted:
        subprocess.run(["umount", folder], check=True)
