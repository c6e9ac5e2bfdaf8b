"""Answers from Transformers, beside plain calls of the model."""

import json
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, MistralConfig

from tacq_vllm.evaluate.backends import Backend, open_runner
from tacq_vllm.evaluate.loading import model_identity
from tacq_vllm.evaluate.runner import Continuation, Prompt, cut_at_stop
from tacq_vllm.evaluate.text import perplexity
from tacq_vllm.evaluate.transformers_runner import (
    TransformersRunner,
    open_transformers,
)
from tacq_vllm.kernels import ops
from tacq_vllm.layers import TacqLinear
from tacq_vllm.quantize.source import locate_model
from tests.conftest import SIZES, VOCAB_SIZE, make_text, save_random
from tests.evaluate.conftest import respond
from tests.evaluate.plain_perplexity import plain_perplexity

CPU = torch.device("cpu")


def opened(folder: Path, *, dequantize: bool = False) -> TransformersRunner:
    return open_transformers(
        str(folder), torch.float32, CPU, 4096, dequantize=dequantize
    )


def lengths_read(runner: TransformersRunner) -> list[int]:
    """A list that gets the number of tokens of whatever goes through the model."""
    read: list[int] = []

    def note(module: torch.nn.Module, args: tuple, options: dict) -> None:
        tokens = args[0] if args else options["input_ids"]
        read.append(tokens.shape[1])

    runner._model.register_forward_pre_hook(note, with_kwargs=True)
    return read


def random_continuations() -> list[Continuation]:
    """Some begin alike, one begins as a whole other one does."""
    generator = torch.Generator().manual_seed(0)

    def draw(count: int) -> tuple[int, ...]:
        return tuple(
            torch.randint(3, VOCAB_SIZE, (count,), generator=generator).tolist()
        )

    shared, tail = draw(20), draw(5)
    return [
        Continuation(draw(1), draw(6)),
        Continuation(shared, tail),
        Continuation(shared, (7,)),
        Continuation(shared, (8,)),
        Continuation(shared[:-2], (*shared[-2:], 9)),
        Continuation(shared + tail, draw(3)),
        Continuation(shared[:12], draw(30)),
        Continuation(draw(9), draw(2)),
    ]


@pytest.fixture(scope="module")
def sliding_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = MistralConfig(**SIZES, sliding_window=8)
    return save_random(config, tmp_path_factory.mktemp("sliding") / "model")


@pytest.mark.parametrize("model", ["tiny_model", "sliding_model", "tiny_checkpoint"])
def test_likelihoods_are_those_of_each_sequence_alone(
    model: str, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(model)
    asked = random_continuations()
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    answers = list(opened(folder).likelihoods(asked))

    for one, answer in zip(asked, answers, strict=True):
        tokens = torch.tensor([one.context + one.tokens])
        with torch.no_grad():
            logits = plain(tokens).logits[0, len(one.context) - 1 : -1].double()
        target = torch.tensor(one.tokens)
        chosen = logits.log_softmax(-1).gather(-1, target[:, None])
        assert answer.total == pytest.approx(float(chosen.sum()), rel=1e-5)
        assert answer.greedy == bool((logits.argmax(-1) == target).all())


@pytest.mark.parametrize("model", ["tiny_model", "sliding_model"])
def test_what_prompts_share_goes_through_the_model_once(
    model: str, request: pytest.FixtureRequest
) -> None:
    """Two subjects of three questions each, two of which share a word more."""
    runner = opened(request.getfixturevalue(model))
    read = lengths_read(runner)
    subjects = [tuple(range(3, 43)), (*range(3, 13), *range(50, 80))]
    questions = [(90, 91, 92), (90, 93, 94), (95, 96)]
    asked = [
        Continuation(subject + question, (answer,))
        for subject in subjects
        for question in questions
        for answer in (5, 6, 7, 8)
    ]

    answers = list(runner.likelihoods(asked))

    assert len(answers) == 24
    assert read == [40, 3, 3, 2, 40, 3, 3, 2]


@pytest.mark.parametrize("dequantize", [False, True])
def test_perplexity_is_that_of_a_plain_script(
    tiny_checkpoint: Path, dequantize: bool
) -> None:
    text = make_text(60)
    runner = opened(tiny_checkpoint, dequantize=dequantize)

    (score,) = perplexity("wikitext2", [text], 64, 5, respond(runner))

    expected = plain_perplexity(tiny_checkpoint, text, window=64, count=5)
    assert score.value == pytest.approx(expected, rel=1e-4)
    assert score.stderr is not None
    assert 0 < score.stderr < score.value / 2


def test_texts_of_prompts_together_are_those_of_each_alone(tiny_model: Path) -> None:
    runner = opened(tiny_model)
    prompts = [Prompt(one.context, 6, ()) for one in random_continuations()]

    together = list(runner.texts(prompts))

    assert together == [next(runner.texts([prompt])) for prompt in prompts]
    assert len(set(together)) > 1
    assert max(len(text.split()) for text in together) == 6


def test_a_stop_ends_a_text_and_is_not_part_of_it(tiny_model: Path) -> None:
    runner = opened(tiny_model)
    (tokens,) = {one.context for one in random_continuations()[1:2]}
    (whole,) = runner.texts([Prompt(tokens, 8, ())])
    words = whole.split()
    stop = words[3]
    read = lengths_read(runner)

    (text,) = runner.texts([Prompt(tokens, 8, (stop,))])

    assert text == cut_at_stop(whole, (stop,))
    assert stop not in text
    # What would follow is not even made.
    assert read == [len(tokens)] + [1] * words.index(stop)


def test_a_text_ends_with_the_token_that_ends_it(tiny_model: Path) -> None:
    runner = opened(tiny_model)
    prompts = [Prompt(one.context, 8, ()) for one in random_continuations()]
    whole = [text.split() for text in runner.texts(prompts)]
    vocabulary = runner.tokenizer.get_vocab()
    end = whole[0][2]
    runner._model.generation_config.eos_token_id = [2, vocabulary[end]]

    texts = list(runner.texts(prompts))

    expected = [words[: words.index(end)] if end in words else words for words in whole]
    assert [text.split() for text in texts] == expected
    assert expected != whole


def test_special_tokens_are_not_part_of_a_text(tiny_model: Path) -> None:
    runner = opened(tiny_model)
    prompts = [Prompt(one.context, 8, ()) for one in random_continuations()]
    whole = [text.split() for text in runner.texts(prompts)]
    special = whole[0][2]
    runner.tokenizer.add_special_tokens({"additional_special_tokens": [special]})

    texts = list(runner.texts(prompts))

    expected = [[word for word in words if word != special] for words in whole]
    assert [text.split() for text in texts] == expected


def test_how_its_makers_sample_changes_no_text(
    tiny_model: Path, model_copy: Path
) -> None:
    prompts = [Prompt(one.context, 8, ()) for one in random_continuations()]
    own = {"repetition_penalty": 9.0, "do_sample": True, "temperature": 5.0}
    file = model_copy / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | own))

    texts = list(opened(model_copy).texts(prompts))

    assert texts == list(opened(tiny_model).texts(prompts))


def test_the_first_of_several_stops_counts() -> None:
    assert cut_at_stop("one; two\n\nthree", ("\n\n", ";")) == "one"
    assert cut_at_stop("one", ("\n\n", ";")) == "one"


def test_what_a_runner_tells_of_itself(tiny_checkpoint: Path, tiny_model: Path) -> None:
    runner = opened(tiny_checkpoint)

    assert runner.name == tiny_checkpoint.name
    assert runner.max_length == 128
    assert {"tacq-vllm", "torch", "transformers"} == runner.versions.keys()
    assert runner.identity == opened(tiny_checkpoint).identity
    assert runner.identity != opened(tiny_model).identity
    assert runner.identity != opened(tiny_checkpoint, dequantize=True).identity
    half = open_transformers(str(tiny_model), torch.float16, CPU, 4096, dequantize=True)
    assert half.dtype == "float16"
    assert half.identity != opened(tiny_model).identity


@pytest.mark.parametrize("dequantize", [False, True])
def test_a_backend_decides_how_a_model_is_opened(
    tiny_checkpoint: Path, dequantize: bool
) -> None:
    backend = Backend("hf", "float16", 64, CPU, dequantize)

    with open_runner(str(tiny_checkpoint), backend) as runner:
        assert (runner.dtype, runner.max_length) == ("float16", 64)
        modules = list(runner._model.modules())  # type: ignore[attr-defined]

    assert any(isinstance(one, TacqLinear) for one in modules) is not dequantize


def test_the_identity_tells_whether_activations_are_rounded(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = ops._kernels("cpu")
    if kernels is None:
        pytest.skip("there are no CPU kernels here")

    def identity(chosen: str) -> str:
        monkeypatch.setattr(kernels, "activations", lambda: chosen)
        return open_transformers(
            str(tiny_checkpoint), torch.bfloat16, CPU, 4096, dequantize=False
        ).identity

    assert identity("int8") != identity("exact")


def test_the_identity_of_a_file_whose_name_is_a_pattern(tmp_path: Path) -> None:
    file = tmp_path / "model[1].gguf"
    file.write_bytes(b"one")
    before = model_identity(locate_model(str(file)))
    (tmp_path / "model1.gguf").write_bytes(b"beside it")
    assert model_identity(locate_model(str(file))) == before

    file.write_bytes(b"another")

    assert model_identity(locate_model(str(file))) != before


@pytest.mark.parametrize(
    "name",
    [
        "model-00001-of-00002.safetensors",
        "pytorch_model.bin",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer.model",
    ],
)
def test_the_identity_of_a_folder(tmp_path: Path, name: str) -> None:
    for file in ("config.json", name):
        (tmp_path / file).write_text("of the model")
    before = model_identity(locate_model(str(tmp_path)))
    (tmp_path / "README.md").write_text("not of the model")
    assert model_identity(locate_model(str(tmp_path))) == before
    status = (tmp_path / name).stat()

    os.utime(tmp_path / name, ns=(0, status.st_mtime_ns + 1))
    newer = model_identity(locate_model(str(tmp_path)))
    (tmp_path / name).write_text("of another")
    os.utime(tmp_path / name, ns=(0, status.st_mtime_ns))

    assert len({before, newer, model_identity(locate_model(str(tmp_path)))}) == 3
