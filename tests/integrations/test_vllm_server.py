"""A real `vllm serve`: what it refuses, and that it reads what the others read."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.builders import rewrite_schema, truncate
from tests.serving import ENVIRONMENT, refusal, server

pytest.importorskip("vllm", reason="vLLM is not installed")
openai = pytest.importorskip("openai", reason="the openai client is not installed")

from transformers import AutoModelForCausalLM, AutoTokenizer

import tacq_vllm.integrations.transformers  # noqa: F401
from tacq_vllm.format.inspection import inspect_checkpoint

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
SMOLLM2 = ROOT / "build/demo/SmolLM2-135M-Instruct-TaCQ-w3"
NEW_TOKENS = 32
PROMPTS = [
    "The capital of France is",
    "Water boils at a temperature of",
    "Once upon a time there was a little",
    "The three primary colors are",
    "def fibonacci(n):",
    "In the year 1969, the first",
    "The opposite of hot is",
    "Dear Sir or Madam, I am writing to",
    "The largest planet in the solar system is",
    "A recipe for pancakes needs flour,",
    "Photosynthesis is the process by which",
    "My favorite book is about",
    "The stock market fell today because",
    "To install the package, run",
    "She opened the door and saw",
    "The mitochondria is the",
    "If x = 3 and y = 4, then x + y =",
    "The best way to learn a language is",
    "Yesterday the weather was",
    "The history of Rome begins with",
]


@pytest.fixture(scope="module")
def smollm2() -> Path:
    if not (SMOLLM2 / "config.json").is_file():
        pytest.skip(f"{SMOLLM2} is not there: `make test` and `make demo` make it")
    return SMOLLM2


@pytest.fixture(scope="module")
def served(smollm2, tmp_path_factory):
    log = tmp_path_factory.mktemp("server") / "log"
    # Without --quantization: config.json says it.
    options = ("--dtype", "float32", "--max-model-len", "1024")
    with server(smollm2, log, *options) as base_url:
        yield openai.OpenAI(base_url=base_url, api_key="none")


def greedy_texts(model, tokenizer) -> list[str]:
    texts = []
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt")
        tokens = model.generate(**inputs, do_sample=False, max_new_tokens=NEW_TOKENS)
        new = tokens[0, inputs.input_ids.shape[1] :]
        texts.append(tokenizer.decode(new, skip_special_tokens=True))
    return texts


def test_three_readings_of_one_checkpoint_agree(smollm2, served):
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    packed = greedy_texts(model, tokenizer)
    dequantized = greedy_texts(model.dequantize(), tokenizer)
    name = served.models.list().data[0].id
    vllm = [
        served.completions.create(
            model=name, prompt=prompt, max_tokens=NEW_TOKENS, temperature=0
        )
        .choices[0]
        .text
        for prompt in PROMPTS
    ]
    assert packed == dequantized
    assert vllm == dequantized
    # The model must say something: one token over and over would agree too.
    assert len(set(vllm)) == len(PROMPTS)
    assert len(set(" ".join(vllm).split())) > 100


def test_it_answers_a_question(served):
    response = served.chat.completions.create(
        model=served.models.list().data[0].id,
        messages=[{"role": "user", "content": "What is the capital of France?"}],
        max_tokens=24,
        temperature=0,
    )
    assert "Paris" in response.choices[0].message.content


RESIDENT = """
import json, os, sys
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
from vllm import LLM

SUFFIXES = ("qweight", "qweight_high", "scales", "qzeros", "qzeros_high", "outliers")

def count(model):
    packed = dense = 0
    for name, parameter in model.named_parameters():
        if name.endswith(SUFFIXES):
            packed += parameter.nbytes
        elif "_proj" in name:
            dense += parameter.nbytes
    return packed, dense

if __name__ == "__main__":
    llm = LLM(sys.argv[1], enforce_eager=True, max_model_len=256, dtype="bfloat16")
    print(json.dumps(llm.apply_model(count)[0]))
"""


def test_resident_weights_stay_packed(smollm2, tmp_path):
    script = tmp_path / "resident.py"
    script.write_text(RESIDENT)
    result = subprocess.run(
        [sys.executable, str(script), str(smollm2)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    packed, dense = json.loads(result.stdout.splitlines()[-1])
    stored = inspect_checkpoint(smollm2).linear_bytes
    assert dense == 0
    assert packed == pytest.approx(stored, rel=0.1)


def test_the_demo_script_answers(smollm2):
    result = subprocess.run(
        [sys.executable, str(ROOT / "examples/serve_and_ask.py"), str(smollm2)],
        stdout=subprocess.PIPE,
        text=True,
        timeout=600,
        check=True,
    )
    answer = json.loads(result.stdout.splitlines()[-1])
    figures = inspect_checkpoint(smollm2)
    assert "Paris" in answer["answer"]
    assert answer["tokens_per_second"] > 3
    assert answer["effective_bits"] == round(figures.effective_bits, 4)
    assert answer["checkpoint_bytes"] == figures.checkpoint_bytes


def assert_refused(folder: Path, reason: str, *options: str) -> None:
    code, lines = refusal(folder, *options)
    assert code != 0
    assert len(lines) == 1
    assert reason in lines[0]


def test_wrong_flag(tiny_checkpoint):
    reason = "this is a TaCQ checkpoint, not 'gptq'"
    assert_refused(tiny_checkpoint, reason, "--quantization", "gptq")


def test_flag_on_a_model_that_is_not_quantized(tiny_llama):
    reason = "config.json has no quantization_config"
    assert_refused(tiny_llama(), reason, "--quantization", "tacq")


def test_truncated_shard(checkpoint_copy):
    truncate(checkpoint_copy / "model.safetensors", 100)
    assert_refused(checkpoint_copy, "model.safetensors: truncated")


def test_later_format_version(checkpoint_copy):
    rewrite_schema(checkpoint_copy, format_version=2)
    assert_refused(checkpoint_copy, "install a newer tacq-vllm")


def test_more_ranks_than_the_linears_can_be_cut_for(tiny_checkpoint):
    # Its four heads could be; vLLM itself refuses a number that does not divide them.
    code, lines = refusal(tiny_checkpoint, "--tensor-parallel-size", "2")
    assert code != 0
    assert len(lines) == 1
    assert "--tensor-parallel-size 2: the linears of this checkpoint" in lines[0]
    assert "can be cut for 1;" in lines[0]
    # In the process that serves: no other has been started.
    assert lines[0].startswith("(APIServer")
