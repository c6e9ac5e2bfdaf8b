"""A live server: it says what the other readers say, to clients of every kind."""

import asyncio
import json
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.serving import ENVIRONMENT, VLLM, server

pytest.importorskip("vllm", reason="vLLM is not installed")
pytest.importorskip("openai", reason="the openai client is not installed")

from openai import BadRequestError, OpenAI
from transformers import AutoModelForCausalLM, AutoTokenizer

import tacq_vllm.integrations.transformers  # noqa: F401
from benchmarks.soak import soak

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

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
CHAT_PROMPTS = Path(__file__).parents[3] / "shared/data/chat/prompts.jsonl"
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
CITY = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 20},
        "is_capital": {"type": "boolean"},
    },
    "required": ["city", "is_capital"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def served(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenAI]:
    log = tmp_path_factory.mktemp("server") / "log"
    # Without --quantization: config.json says it.
    options = ["--dtype", "float32", "--max-model-len", "1024"]
    options += ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
    with server(smollm2, log, *options) as base_url:
        yield OpenAI(base_url=base_url, api_key="none")


@pytest.fixture
def model_name(served: OpenAI) -> str:
    return served.models.list().data[0].id


def complete(
    served: OpenAI, model_name: str, prompt: str | list[str], **options: Any
) -> Any:
    options = {"max_tokens": NEW_TOKENS, "temperature": 0} | options
    return served.completions.create(model=model_name, prompt=prompt, **options)


# Where the model would end its answer depends on the machine that quantized it: it goes
# on, the end being a token like others, or not to be chosen.
PAST_THE_END: dict[str, Any] = {"extra_body": {"ignore_eos": True}}
WITHOUT_END: dict[str, Any] = {"extra_body": {"min_tokens": NEW_TOKENS}}


def greedy_texts(model: Any, tokenizer: Any, prompts: list[str]) -> list[str]:
    """What a model of Transformers says after prompts, all of them at once."""
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    tokens = model.generate(**inputs, do_sample=False, max_new_tokens=NEW_TOKENS)
    new = tokens[:, inputs.input_ids.shape[1] :]
    texts: list[str] = tokenizer.batch_decode(new, skip_special_tokens=True)
    return texts


def test_three_readings_of_one_checkpoint_agree(
    smollm2: Path, served: OpenAI, model_name: str
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    packed = greedy_texts(model, tokenizer, PROMPTS)
    alone = [greedy_texts(model, tokenizer, [prompt])[0] for prompt in PROMPTS[:5]]
    dequantized = greedy_texts(model.dequantize(), tokenizer, PROMPTS)
    vllm = [choice.text for choice in complete(served, model_name, PROMPTS).choices]
    assert packed == dequantized
    assert alone == dequantized[:5]
    assert vllm == dequantized
    # The model must say something: one token over and over would agree too.
    assert len(set(vllm)) == len(PROMPTS)
    assert len(set(" ".join(vllm).split())) > 100


def test_streams_give_the_same_text(served: OpenAI, model_name: str) -> None:
    whole = complete(served, model_name, PROMPTS[0], **WITHOUT_END).choices[0].text
    chunks = list(complete(served, model_name, PROMPTS[0], stream=True, **WITHOUT_END))

    assert "".join(chunk.choices[0].text for chunk in chunks) == whole
    assert len(chunks) > NEW_TOKENS // 2

    options: dict[str, Any] = {"max_tokens": NEW_TOKENS, "temperature": 0}
    chat = served.chat.completions
    answer = chat.create(model=model_name, messages=QUESTION, **options)
    parts = chat.create(model=model_name, messages=QUESTION, stream=True, **options)
    streamed = "".join(part.choices[0].delta.content or "" for part in parts)
    assert streamed == answer.choices[0].message.content
    assert "France" in streamed


def test_logprobs(served: OpenAI, model_name: str) -> None:
    options = PAST_THE_END | {"logprobs": 3}
    choice = complete(served, model_name, PROMPTS[0], **options).choices[0]

    chosen = choice.logprobs.token_logprobs
    assert len(chosen) == NEW_TOKENS
    for logprob, best in zip(chosen, choice.logprobs.top_logprobs, strict=True):
        # Greedy: no token is likelier, and together they are no more than certain.
        assert logprob == max(best.values()) <= 0
        assert len(best) >= 3


def test_several_choices_and_stops(served: OpenAI, model_name: str) -> None:
    options: dict[str, Any] = {"n": 4, "temperature": 1.0, "seed": 1}
    texts = [
        c.text for c in complete(served, model_name, PROMPTS[2], **options).choices
    ]
    assert len(set(texts)) == 4

    whole = complete(served, model_name, PROMPTS[2]).choices[0].text
    stop = whole.split()[3]
    choice = complete(served, model_name, PROMPTS[2], stop=[stop]).choices[0]
    assert choice.finish_reason == "stop"
    assert choice.text == whole[: whole.index(stop)]


def test_a_json_schema(served: OpenAI, model_name: str) -> None:
    answer = served.chat.completions.create(
        model=model_name,
        messages=QUESTION,
        temperature=0,
        max_tokens=128,
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "city", "schema": CITY},
        },
    )

    content = json.loads(answer.choices[0].message.content)
    assert isinstance(content["city"], str)
    assert isinstance(content["is_capital"], bool)
    assert set(content) == {"city", "is_capital"}


def test_a_tool(served: OpenAI, model_name: str) -> None:
    look = {"name": "look", "parameters": CITY, "strict": True}
    answer = served.chat.completions.create(
        model=model_name,
        messages=QUESTION,
        temperature=0,
        max_tokens=128,
        tools=[{"type": "function", "function": look}],
        tool_choice={"type": "function", "function": {"name": "look"}},
    )

    (call,) = answer.choices[0].message.tool_calls
    assert call.function.name == "look"
    assert set(json.loads(call.function.arguments)) == {"city", "is_capital"}


def test_many_at_once_say_what_each_says_alone(served: OpenAI, model_name: str) -> None:
    prompts = [f"{number}. {prompt}" for number in (1, 2) for prompt in PROMPTS][:32]

    def ask(prompt: str) -> str:
        answer = complete(served, model_name, prompt, max_tokens=NEW_TOKENS // 4)
        text: str = answer.choices[0].text
        return text

    alone = [ask(prompt) for prompt in prompts]
    with ThreadPoolExecutor(len(prompts)) as clients:
        together = list(clients.map(ask, prompts))

    assert together == alone


def test_a_bad_request_leaves_the_server_well(served: OpenAI, model_name: str) -> None:
    with pytest.raises(BadRequestError):
        complete(served, model_name, PROMPTS[0], max_tokens=100_000)

    assert complete(served, model_name, PROMPTS[0]).choices[0].text


@pytest.mark.skipif(not CHAT_PROMPTS.is_file(), reason=f"{CHAT_PROMPTS} is not there")
def test_200_chats_in_the_benchmark_of_vllm(
    served: OpenAI, model_name: str, tmp_path: Path
) -> None:
    lines = CHAT_PROMPTS.read_text().splitlines()
    prompts = [json.loads(line)["turns"][0] for line in lines]
    short = sorted(prompts, key=len)[:200]
    dataset = tmp_path / "prompts.jsonl"
    dataset.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in short))
    command = [VLLM, "bench", "serve", "--base-url", str(served.base_url)[:-4]]
    command += ["--model", model_name, "--tokenizer", model_name, "--save-result"]
    command += ["--dataset-name", "custom", "--dataset-path", dataset]
    command += ["--num-prompts", "200", "--custom-output-len", "4"]
    command += ["--max-concurrency", "16", "--result-filename", tmp_path / "result"]

    result = subprocess.run(
        command, env=ENVIRONMENT, capture_output=True, text=True, timeout=900
    )

    assert result.returncode == 0, result.stderr[-4000:]
    figures = json.loads((tmp_path / "result").read_text())
    assert len(short) == 200
    assert figures["completed"] == 200
    assert figures["failed"] == 0


def test_under_load_for_a_while(served: OpenAI) -> None:
    result = asyncio.run(soak(str(served.base_url), requests=100, at_once=16))

    assert result["errors"] == []
    assert result["same_answers"]
    assert result["answered"] > 60
    assert result["vanished"] > 0
    assert result["refused"] > 0
