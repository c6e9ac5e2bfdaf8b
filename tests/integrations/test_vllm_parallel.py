"""Live servers of two processes: they say what a server of one says."""

import os
import re
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.serving import ENVIRONMENT, server

pytest.importorskip("vllm", reason="vLLM is not installed")
pytest.importorskip("openai", reason="the openai client is not installed")

from openai import OpenAI

from tacq_vllm.config import Recipe
from tests.conftest import open_model, quick, run_pipeline
from tests.integrations.training import questions, train_llama

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(os.cpu_count() == 1, reason="each process needs a core"),
]

PROMPTS = [question for question, _ in questions()[::5]]


@dataclass(frozen=True)
class Said:
    """What a server says, and of itself."""

    texts: list[str]
    """What follows each prompt, greedily."""
    log_lines: list[str]
    """Those of the plugin."""
    busy_engines: set[str]
    """Engines that have made tokens."""


@pytest.fixture(scope="module")
def checkpoint(tiny_recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    text = "\n".join(f"{question} {answer}" for question, answer in questions())
    (folder / "text.txt").write_text(text)
    base = open_model(train_llama(text, folder / "model"), folder / "work")
    recipe = quick(tiny_recipe, **{"calibration.sources": [str(folder / "text.txt")]})
    run_pipeline(base, recipe, folder / "trained", folder / "work")
    return folder / "trained"


def ask(checkpoint: Path, log: Path, cores: str, *options: str) -> Said:
    """Serve in float32, and ask for all prompts at once."""
    options = ("--dtype", "float32", *options)
    environment = ENVIRONMENT | {"VLLM_CPU_OMP_THREADS_BIND": cores}
    with server(checkpoint, log, *options, environment=environment) as base_url:
        client = OpenAI(base_url=base_url, api_key="none")
        completion = client.completions.create(
            model=str(checkpoint), prompt=PROMPTS, temperature=0, max_tokens=32
        )
        with urllib.request.urlopen(base_url.replace("/v1", "/metrics")) as answer:
            metrics = answer.read().decode()
    lines = [line for line in log.read_text().splitlines() if "] tacq: " in line]
    made = r'^vllm:generation_tokens_total\{engine="(\d+)".*\} [1-9]'
    engines = set(re.findall(made, metrics, re.MULTILINE))
    return Said([choice.text for choice in completion.choices], lines, engines)


@pytest.fixture(scope="module")
def alone(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Said:
    return ask(checkpoint, tmp_path_factory.mktemp("alone") / "log", "0")


def test_the_trained_model_says_many_things(alone: Said) -> None:
    """What follows holds of one token over and over too.

    At 3 bits two questions may get one answer; which, depends on the processor.
    """
    assert len(set(alone.texts)) > 3 / 4 * len(PROMPTS)
    assert len(set(" ".join(alone.texts).split())) > 100
    assert alone.busy_engines == {"0"}


def test_two_ranks(checkpoint: Path, alone: Said, tmp_path: Path) -> None:
    said = ask(checkpoint, tmp_path / "log", "0|1", "--tensor-parallel-size", "2")

    assert said.texts == alone.texts
    assert len(said.log_lines) == len(alone.log_lines) == 1


def test_two_replicas(checkpoint: Path, alone: Said, tmp_path: Path) -> None:
    said = ask(checkpoint, tmp_path / "log", "0|1", "--data-parallel-size", "2")

    assert said.texts == alone.texts
    assert said.busy_engines == {"0", "1"}
    # Of each its own.
    assert len(said.log_lines) == 2
