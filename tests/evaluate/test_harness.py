import pytest

from tacq_vllm.data.sets import Item
from tacq_vllm.evaluate.questions import Questions
from tests.evaluate.conftest import Parrot, respond

pytest.importorskip("lm_eval", reason="the harness needs the extra `eval`")

from tacq_vllm.evaluate.harness.tasks import harness_values


def test_mmlu_takes_the_likeliest_letter() -> None:
    right = ("A", "B", "D")
    items = [Item(f"{n}\nAnswer:", f" {a}", "art") for n, a in enumerate(right)]
    runner = Parrot()

    values = harness_values(Questions.spread("mmlu", items, None), respond(runner))

    assert values == [0.0, 1.0, 0.0]
    asked = ["".join(map(chr, one.context + one.tokens)) for one in runner.asked]
    assert asked[:4] == [f"0\nAnswer: {letter}" for letter in "ABCD"]


@pytest.mark.parametrize(
    ("answer", "value"),
    [
        (" so 18.\n#### 18", 1.0),
        (" so 1,018.\n#### 1,018", 0.0),
        (" #### 18.\n", 1.0),
        (" #### 18\n#### 20", 1.0),
        (" #### 20\n#### 18", 0.0),
        (" #### -18", 0.0),
        (" so it is 18", 0.0),
        ("", 0.0),
    ],
)
def test_gsm8k_takes_the_number_after_the_mark(answer: str, value: float) -> None:
    items = [Item("Question: ?\nAnswer:", " 9 + 9 = 18\n#### 18", "")]
    runner = Parrot(answer)

    values = harness_values(Questions.spread("gsm8k", items, None), respond(runner))

    assert values == [value]
    (asked,) = runner.asked
    assert asked.stops == ("\n\n", "Question:")
    assert asked.max_tokens == 320


def test_thousands_are_read_with_and_without_commas() -> None:
    items = [Item("Question: ?\nAnswer:", " it is\n#### 1,018", "")]

    values = harness_values(
        Questions.spread("gsm8k", items, None), respond(Parrot("#### 1018"))
    )

    assert values == [1.0]
