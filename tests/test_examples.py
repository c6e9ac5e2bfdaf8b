"""The scripts in examples/, run as people run them, on a tiny model."""

import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig
from typer.main import get_command

from tacq_vllm.cli import app
from tacq_vllm.config import Recipe
from tacq_vllm.format.checkpoint import WEIGHTS_NAME, read_schema
from tacq_vllm.format.validation import find_faults
from tacq_vllm.scores import SCORES_NAME, read_scores
from tests.builders import truncate
from tests.conftest import SIZES, make_chat_tokenizer, make_text, save_random
from tests.hub_server import Hub

EXAMPLES = Path(__file__).parents[1] / "examples"
PROMPT = "the old river"

RunHere = Callable[..., str]


@pytest.fixture
def run_here(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> RunHere:
    """Run a script in this process; give what it prints."""

    def run(name: str, *arguments: str | Path) -> str:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        monkeypatch.syspath_prepend(str(EXAMPLES))
        capfd.readouterr()
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capfd.readouterr().out

    return run


def run_example(
    name: str, *arguments: str | Path, environment: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    """Run a script in a process, which reads its environment."""
    return subprocess.run(
        [sys.executable, EXAMPLES / name, *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_use_from_transformers(tiny_checkpoint: Path, run_here: RunHere) -> None:
    text = run_here("use_from_transformers.py", tiny_checkpoint, PROMPT)

    assert text.startswith(PROMPT)
    assert len(text.split()) > len(PROMPT.split()) + 1


def test_train_lora(
    tiny_checkpoint: Path, task_file: Path, tmp_path: Path, run_here: RunHere
) -> None:
    pytest.importorskip("peft", reason="PEFT is not installed")
    from peft import PeftModel

    options = ["--steps", "80", "--learning-rate", "0.01"]
    adapter = tmp_path / "adapter"

    said = run_here("train_lora.py", tiny_checkpoint, task_file, adapter, *options)

    match = re.fullmatch(r"loss (\S+) before, (\S+) after\n", said)
    assert match is not None
    assert float(match[2]) < 0.8 * float(match[1])
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    tokens = torch.arange(3, 20)[None]
    with torch.no_grad():
        before = model(tokens).logits
        adapted = PeftModel.from_pretrained(model.dequantize(), adapter)
        assert (adapted(tokens).logits - before).norm() > 0.1 * before.norm()


def test_air_gapped(
    hub: Hub, tiny_checkpoint: Path, tmp_path: Path, run_here: RunHere
) -> None:
    files = {path.name: path.read_bytes() for path in tiny_checkpoint.iterdir()}
    hub.add("org/tiny", files)
    folder, environment = tmp_path / "carried", hub.environment(tmp_path / "hf")

    fetched = run_example(
        "air_gapped.py", "fetch", "org/tiny", folder, environment=environment
    )
    requests = len(hub.requests)
    # Kernels that take less time to compile.
    environment |= {"TACQ_CPU_ACTIVATIONS": "exact"}
    asked = run_example("air_gapped.py", "ask", folder, PROMPT, environment=environment)
    truncate(folder / WEIGHTS_NAME)
    with pytest.raises(SystemExit) as refusal:
        run_here("air_gapped.py", "ask", folder, PROMPT)

    assert fetched.returncode == 0, fetched.stderr
    assert asked.returncode == 0, asked.stderr
    assert asked.stdout.startswith(PROMPT)
    assert len(asked.stdout.split()) > len(PROMPT.split()) + 1
    assert len(hub.requests) == requests
    assert "truncated" in str(refusal.value)


@pytest.mark.skipif(
    "evaluate" not in get_command(app).commands, reason="there is no `tacq evaluate`"
)
def test_evaluate_and_push(
    hub: Hub, tiny_model: Path, checkpoint_copy: Path, tmp_path: Path
) -> None:
    texts = tmp_path / "data" / "wikitext2"
    texts.mkdir(parents=True)
    for split in ("train", "test"):
        (texts / f"{split}.txt").write_text(f"{split} . {make_text()}")

    result = run_example(
        "evaluate_and_push.py",
        *(checkpoint_copy, tiny_model, "someone/tiny-TaCQ-w3"),
        *("--data-root", tmp_path / "data", "--window", "32"),
        environment=hub.environment(tmp_path / "hf"),
    )

    assert result.returncode == 0, result.stderr
    repo = hub.repos["someone/tiny-TaCQ-w3"]
    assert repo.private
    scores = read_scores(checkpoint_copy)
    assert scores is not None
    assert scores.scores[0].baseline is not None
    files = repo.files()
    assert files[SCORES_NAME] == (checkpoint_copy / SCORES_NAME).read_bytes()
    assert b"| wikitext2 | perplexity | " in files["README.md"]


@pytest.mark.vllm
@pytest.mark.slow
def test_quantize_and_serve(tmp_path: Path, run_here: RunHere) -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed")
    pytest.importorskip("openai", reason="the openai client is not installed")
    # Longer than the context that is served, with heads that vLLM takes on a CPU.
    sizes = SIZES | {"max_position_embeddings": 2048, "head_dim": 32}
    model = save_random(LlamaConfig(**sizes), tmp_path / "model")
    make_chat_tokenizer().save_pretrained(model)
    task = tmp_path / "task.jsonl"
    task.write_text('{"prompt": "the old river", "completion": " follows"}\n')
    output = tmp_path / "made"

    said = run_here(
        *("quantize_and_serve.py", model, task, output, PROMPT),
        *("--bits", "3", "--group-size", "32"),
    )

    assert find_faults(output) == []
    recipe = Recipe.model_validate(read_schema(output).recipe)
    assert recipe.calibration.sources == ("task.jsonl",)
    assert said.strip()
