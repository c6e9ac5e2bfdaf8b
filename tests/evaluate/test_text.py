import math
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from tacq_vllm.evaluate.errors import EvaluateError
from tacq_vllm.evaluate.runner import Continuation, Likelihood
from tacq_vllm.evaluate.text import perplexity
from tests.evaluate.conftest import Parrot, respond


def test_windows_do_not_overlap_and_predict_all_but_the_first_token() -> None:
    runner = Parrot()

    (score,) = perplexity("c4", ["abc", "defgh"], 4, None, respond(runner))

    assert [
        ("".join(map(chr, one.context)), "".join(map(chr, one.tokens)))
        for one in runner.asked
    ] == [("a", "bc\n"), ("\n", "def")]
    assert score.value == pytest.approx(math.exp(0.5))
    assert score.stderr == 0.0
    assert (score.task, score.metric, score.limit) == ("c4", "perplexity", None)


def test_a_limit_takes_the_first_windows() -> None:
    runner = Parrot()

    (score,) = perplexity("c4", ["abcdefgh"], 2, 3, respond(runner))

    assert [chr(one.context[0]) for one in runner.asked] == ["a", "c", "e"]
    assert score.limit == 3


def test_a_limit_leaves_most_of_a_long_text_unread() -> None:
    read: list[int] = []

    class Reader(Parrot):
        def tokenizer(self, text: str, **options: Any) -> Any:
            read.append(len(text))
            return super().tokenizer(text, **options)

    few, all_of_them = Reader(), Parrot()
    documents = [f"document {number}" for number in range(1000)]

    perplexity("c4", documents, 25, 4, respond(few))
    perplexity("c4", documents, 25, None, respond(all_of_them))

    assert few.asked == all_of_them.asked[:4]
    assert sum(read) < 500


def test_the_standard_error_is_that_of_the_perplexity() -> None:
    class Uneven(Parrot):
        def likelihoods(self, asked: Sequence[Continuation]) -> Iterator[Likelihood]:
            for one, loss in zip(asked, (1.0, 2.0, 6.0), strict=True):
                yield Likelihood(-loss * len(one.tokens), greedy=False)

    (score,) = perplexity("c4", ["abcdefghijk"], 3, None, respond(Uneven()))

    # The mean of the losses is 3; they differ from it by 2, 1 and 3.
    assert score.value == pytest.approx(math.exp(3))
    assert score.stderr == pytest.approx(math.exp(3) * math.sqrt(14 / 2 / 3))


def test_a_window_as_long_as_there_is_room_for() -> None:
    (score,) = perplexity("c4", ["abcdefgh"], 8, None, respond(Parrot(max_length=8)))

    assert score.value == pytest.approx(math.exp(0.5))


def test_the_last_token_of_a_limit_sees_what_follows() -> None:
    class Pairs(Parrot):
        def tokenizer(self, text: str, **options: Any) -> Any:
            pairs = [text[i : i + 2] for i in range(0, len(text), 2)]
            return SimpleNamespace(input_ids=[ord(max(pair)) for pair in pairs])

    few, all_of_them = Pairs(), Pairs()

    perplexity("c4", ["\t\t\t", "def"], 2, 1, respond(few))
    perplexity("c4", ["\t\t\t", "def"], 2, None, respond(all_of_them))

    assert few.asked == all_of_them.asked[:1]


@pytest.mark.parametrize(
    ("window", "reason"),
    [(11, "8 tokens of text, less than a window of 11"), (21, "more than the 20")],
)
def test_windows_that_do_not_fit(window: int, reason: str) -> None:
    runner = Parrot(max_length=20)

    with pytest.raises(EvaluateError, match=reason):
        perplexity("c4", ["abcdefgh"], window, None, respond(runner))


def test_a_single_window_has_no_standard_error() -> None:
    (score,) = perplexity("c4", ["abcd"], 4, None, respond(Parrot()))

    assert score.stderr is None


def test_a_loss_that_has_no_perplexity() -> None:
    class Wrong(Parrot):
        def likelihoods(self, asked: Sequence[Continuation]) -> Iterator[Likelihood]:
            for one in asked:
                yield Likelihood(-710.0 * len(one.tokens), greedy=False)

    with pytest.raises(EvaluateError, match="a loss of 710 nats a token, too large"):
        perplexity("c4", ["abcdefgh"], 4, None, respond(Wrong()))
