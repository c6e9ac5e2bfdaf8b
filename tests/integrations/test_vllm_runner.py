"""What vLLM is asked to evaluate a model, and what is made of its answers."""

import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import LlamaConfig, Mistral3Config

pytest.importorskip("vllm", reason="vLLM is not installed")

from vllm import SamplingParams
from vllm.logprobs import Logprob
from vllm.platforms import current_platform
from vllm.v1.engine.exceptions import EngineDeadError

from tacq_vllm.evaluate import vllm_runner
from tacq_vllm.evaluate.errors import EvaluateError
from tacq_vllm.evaluate.runner import Continuation, Likelihood, Prompt
from tacq_vllm.evaluate.vllm_runner import VllmRunner, open_vllm
from tests.conftest import SIZES

pytestmark = pytest.mark.vllm


def loss_of(place: int, token: int) -> float:
    """Exact in binary, so that sums are too."""
    return (place * 64 + token) / 1024


class Engine:
    """Answers as vLLM does, without a model.

    A token's log-probability is its place's and its own; even ones are the likeliest.
    """

    def __init__(self, *given: Any, **options: Any) -> None:
        self.given = given
        self.options = options
        self.asked: list[tuple[list[int], SamplingParams]] = []
        self.calls: list[int] = []
        self.is_dead = False
        self.stopped = 0
        self.llm_engine = SimpleNamespace(
            engine_core=SimpleNamespace(shutdown=self.stop)
        )

    def stop(self) -> None:
        self.stopped += 1

    def get_tokenizer(self) -> str:
        return "tokenizer"

    def generate(
        self,
        prompts: Sequence[dict[str, list[int]]],
        params: SamplingParams | list[SamplingParams],
        use_tqdm: bool,
    ) -> list[Any]:
        assert not use_tqdm
        if self.is_dead:
            raise EngineDeadError
        each = params if isinstance(params, list) else [params] * len(prompts)
        self.calls.append(len(prompts))
        tokens = [prompt["prompt_token_ids"] for prompt in prompts]
        self.asked += zip(tokens, each, strict=True)
        return [
            SimpleNamespace(
                prompt_logprobs=[None, *map(self._told, range(1, len(ids)), ids[1:])],
                outputs=[SimpleNamespace(text=f"after {ids}")],
            )
            for ids in tokens
        ]

    def _told(self, place: int, token: int) -> dict[int, Logprob]:
        likelihood = Logprob(-loss_of(place, token), rank=1 + token % 2)
        return {token: likelihood, token + 1000: Logprob(0.0, rank=1)}


@pytest.fixture
def engine() -> Engine:
    return Engine()


@pytest.fixture
def runner(engine: Engine) -> VllmRunner:
    return VllmRunner(engine, "model", "identity", "float32", 127)


def test_the_tokens_of_a_continuation_alone_are_summed(
    runner: VllmRunner, engine: Engine
) -> None:
    asked = [Continuation((1,), (4,)), Continuation((3, 5), (2, 8, 6))]
    asked += [Continuation((2,), (4, 7)), Continuation((2, 2), (7, 4))]

    answers = list(runner.likelihoods(asked))

    assert answers == [
        Likelihood(-loss_of(1, 4), greedy=True),
        Likelihood(-loss_of(2, 2) - loss_of(3, 8) - loss_of(4, 6), greedy=True),
        Likelihood(-loss_of(1, 4) - loss_of(2, 7), greedy=False),
        Likelihood(-loss_of(2, 7) - loss_of(3, 4), greedy=False),
    ]
    assert [tokens for tokens, _ in engine.asked] == [
        list(one.context + one.tokens) for one in asked
    ]
    for _, params in engine.asked:
        assert (params.temperature, params.max_tokens) == (0.0, 1)
        assert params.prompt_logprobs == 0


def test_each_prompt_is_continued_greedily_to_its_own_end(
    runner: VllmRunner, engine: Engine
) -> None:
    asked = [Prompt((1, 2), 5, (";", "\n\n")), Prompt((3,), 7, ())]

    texts = list(runner.texts(asked))

    assert texts == ["after [1, 2]", "after [3]"]
    told = [(p.temperature, p.max_tokens, p.stop) for _, p in engine.asked]
    assert told == [(0.0, 5, [";", "\n\n"]), (0.0, 7, [])]
    # Neither what its makers sample with, nor a stop in the text.
    assert all(p.repetition_penalty == 1.0 for _, p in engine.asked)
    assert not any(p.include_stop_str_in_output for _, p in engine.asked)


def test_answers_come_in_order_some_at_a_time(
    runner: VllmRunner, engine: Engine
) -> None:
    """So that the log of a killed run has most of them."""
    prompts = [Prompt((number,), 1, ()) for number in range(70)]
    continuations = [Continuation((1,), (number,)) for number in range(70)]

    texts = runner.texts(prompts)
    first = next(texts)
    assert engine.calls == [32]
    assert [first, *texts] == [f"after [{number}]" for number in range(70)]
    answers = list(runner.likelihoods(continuations))

    assert [answer.total for answer in answers] == [
        -loss_of(1, number) for number in range(70)
    ]
    assert engine.calls == [32, 32, 6] * 2


def test_an_engine_that_ends_is_told_in_one_line(
    runner: VllmRunner, engine: Engine
) -> None:
    engine.is_dead = True

    for answers in (
        runner.likelihoods([Continuation((1,), (2,))]),
        runner.texts([Prompt((1,), 1, ())]),
    ):
        with pytest.raises(EvaluateError, match=r"^model: vLLM's engine has ended.*$"):
            list(answers)


def test_a_runner_stops_its_engine(runner: VllmRunner, engine: Engine) -> None:
    runner.close()

    assert engine.stopped == 1


@pytest.mark.parametrize(
    ("asked", "length"), [(4096, 127), (128, 127), (127, 127), (126, 126), (2, 2)]
)
def test_a_model_is_opened_with_room_for_a_token_more(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, asked: int, length: int
) -> None:
    """Of 128 positions, as many as are asked for."""
    monkeypatch.setattr(vllm_runner, "LLM", Engine)

    runner = open_vllm(str(tiny_model), "bfloat16", asked)

    assert runner.max_length == length
    engine = runner._engine
    assert engine.given == (str(tiny_model),)
    assert engine.options == {
        "dtype": "bfloat16",
        "max_model_len": length + 1,
        "max_num_batched_tokens": 2048,
        "enable_chunked_prefill": True,
        "enforce_eager": current_platform.is_cpu(),
        "kv_cache_memory_bytes": 4 << 30 if current_platform.is_cpu() else None,
    }


def test_the_positions_of_a_model_that_sees_are_those_of_its_text(
    model_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Mistral3Config(text_config=LlamaConfig(**SIZES).to_dict())
    config.save_pretrained(model_copy)
    monkeypatch.setattr(vllm_runner, "LLM", Engine)

    assert open_vllm(str(model_copy), "float32", 4096).max_length == 127


def test_a_model_without_positions_has_room_for_what_is_asked(
    model_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (model_copy / "config.json").write_text(json.dumps({"model_type": "bloom"}))
    monkeypatch.setattr(vllm_runner, "LLM", Engine)

    assert open_vllm(str(model_copy), "float32", 4096).max_length == 4096


def test_what_a_runner_tells_of_itself(
    tiny_model: Path, model_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_runner, "LLM", Engine)
    (model_copy / "config.json").touch()

    runner = open_vllm(str(tiny_model), "float32", 64)

    assert runner.name == tiny_model.name
    assert runner.dtype == "float32"
    assert runner.tokenizer == "tokenizer"
    assert runner.versions.keys() == {"tacq-vllm", "torch", "transformers", "vllm"}
    assert runner.versions["vllm"] == version("vllm")
    assert runner.identity == open_vllm(str(tiny_model), "float32", 128).identity
    identities = [
        runner.identity,
        open_vllm(str(tiny_model), "bfloat16", 64).identity,
        open_vllm(str(model_copy), "float32", 64).identity,
    ]
    if current_platform.is_cpu():
        chosen = "exact" if vllm_runner.activations() == "int8" else "int8"
        monkeypatch.setattr(vllm_runner, "activations", lambda: chosen)
        identities.append(open_vllm(str(tiny_model), "float32", 64).identity)
    assert len(set(identities)) == len(identities)


def test_what_vllm_says_of_a_model_that_it_does_not_know(model_copy: Path) -> None:
    config = model_copy / "config.json"
    unknown = {"architectures": ["UnheardForCausalLM"]}
    config.write_text(json.dumps(json.loads(config.read_text()) | unknown))

    with pytest.raises(EvaluateError) as caught:
        open_vllm(str(model_copy), "float32", 64)

    assert str(caught.value).startswith(f"{model_copy}: cannot be loaded: ")
    assert "UnheardForCausalLM" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_gguf_file_is_not_for_vllm(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.touch()

    with pytest.raises(EvaluateError, match=r"gguf: vLLM reads no GGUF: use --backend"):
        open_vllm(str(file), "float32", 64)
