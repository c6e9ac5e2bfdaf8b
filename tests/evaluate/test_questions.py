from typing import Any

import pytest

from tacq_vllm.data.sets import Item
from tacq_vllm.evaluate.errors import EvaluateError
from tacq_vllm.evaluate.questions import Questions, completion_loss, encode
from tacq_vllm.evaluate.runner import Prompt
from tests.conftest import Recorder
from tests.evaluate.conftest import Parrot, respond

ITEMS = [Item(f"question {n}:", f" {'x' * (n + 1)}", "") for n in range(10)]


@pytest.mark.parametrize(
    ("limit", "numbers"),
    [
        (None, tuple(range(10))),
        (1, (0,)),
        (3, (0, 3, 6)),
        (4, (0, 2, 5, 7)),
        (7, (0, 1, 2, 4, 5, 7, 8)),
        (20, tuple(range(10))),
    ],
)
def test_a_limit_spreads_over_the_split(limit: int, numbers: tuple[int, ...]) -> None:
    questions = Questions.spread("gsm8k", ITEMS, limit)

    assert questions.numbers == numbers
    assert questions.items == tuple(ITEMS[number] for number in numbers)


def test_the_loss_is_the_mean_over_items_of_their_mean() -> None:
    (score,) = completion_loss(Questions.spread("gsm8k", ITEMS, 2), respond(Parrot()))

    assert score.value == pytest.approx(0.5)
    assert (score.task, score.metric, score.limit) == ("gsm8k", "loss", 2)


def test_only_the_completion_is_scored() -> None:
    runner = Parrot()

    completion_loss(Questions.spread("gsm8k", ITEMS, 1), respond(runner))

    (asked,) = runner.asked
    assert "".join(map(chr, asked.context)) == "question 0:"
    assert "".join(map(chr, asked.tokens)) == " x"


def test_long_prompts_are_cut_on_the_left_which_is_told() -> None:
    runner, listener = Parrot(max_length=6), Recorder()

    completion_loss(
        Questions.spread("gsm8k", ITEMS, 1), respond(runner, listener=listener)
    )

    (asked,) = runner.asked
    assert "".join(map(chr, asked.context)) == "n 0:"
    (note,) = listener.notes
    assert "1 prompts and their answers are longer than the 6 tokens" in note


@pytest.mark.parametrize(
    ("max_length", "kept", "max_tokens", "notes"),
    [
        (19, 11, 8, []),
        (18, 10, 8, ["1 prompts and their answers are longer than the 18"]),
        (
            14,
            7,
            7,
            [
                "1 prompts and their answers are longer than the 14",
                "answers have at most 7, not 8 tokens, half of the 14",
            ],
        ),
    ],
)
def test_a_prompt_leaves_room_for_what_is_generated(
    max_length: int, kept: int, max_tokens: int, notes: list[str]
) -> None:
    runner, listener = Parrot(max_length=max_length), Recorder()
    prompt = Prompt(tuple(map(ord, "question 0:")), 8, (";",))

    respond(runner, listener=listener).texts("spider", [0], [prompt])

    (asked,) = runner.asked
    assert asked.tokens == prompt.tokens[-kept:]
    assert (asked.max_tokens, asked.stops) == (max_tokens, (";",))
    for note, expected in zip(listener.notes, notes, strict=True):
        assert expected in note


def test_a_short_prompt_is_whole_where_answers_are_short() -> None:
    runner, listener = Parrot(max_length=40), Recorder()
    prompt = Prompt((1, 2), 30, ())

    respond(runner, listener=listener).texts("spider", [0], [prompt])

    assert runner.asked == [Prompt((1, 2), 20, ())]
    (note,) = listener.notes
    assert "answers have at most 20, not 30 tokens" in note


def test_an_answer_that_does_not_fit() -> None:
    with pytest.raises(EvaluateError, match="an answer of 11 tokens"):
        completion_loss(
            Questions.spread("gsm8k", ITEMS[9:], None), respond(Parrot(max_length=11))
        )


class Merging:
    """A tokenizer whose tokens are pairs of letters from the left."""

    def __call__(self, text: str) -> Any:
        pairs = [text[i : i + 2] for i in range(0, len(text), 2)]
        return type("", (), {"input_ids": [hash(pair) for pair in pairs]})


def test_a_token_over_the_border_belongs_to_the_completion() -> None:
    asked = encode(Merging(), "abc", "def")

    assert asked.context == (hash("ab"),)
    assert asked.tokens == (hash("cd"), hash("ef"))


def test_nothing_to_predict() -> None:
    with pytest.raises(EvaluateError, match="no token to predict"):
        encode(Merging(), "a", "")
