import json
from pathlib import Path

import pytest

from tacq_vllm.evaluate.errors import EvaluateError
from tacq_vllm.evaluate.questions import Questions, completion_loss
from tacq_vllm.evaluate.runner import Prompt
from tacq_vllm.evaluate.samples import SampleLog
from tacq_vllm.evaluate.text import perplexity
from tests.conftest import Recorder
from tests.evaluate.conftest import Parrot, respond
from tests.evaluate.test_questions import ITEMS

QUESTIONS = Questions.spread("gsm8k", ITEMS, None)


class Dying(Parrot):
    """Dies after some answers."""

    def likelihoods(self, asked):  # type: ignore[no-untyped-def]
        for number, answer in enumerate(super().likelihoods(asked)):
            if number == 4:
                raise KeyboardInterrupt
            yield answer


def test_a_run_goes_on_where_one_was_killed(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    whole = completion_loss(QUESTIONS, respond(Parrot()))
    with pytest.raises(KeyboardInterrupt):
        completion_loss(QUESTIONS, respond(Dying(), SampleLog(path)))
    with path.open("a") as file:
        file.write('{"half a line": ')

    runner, listener = Parrot(), Recorder()
    scores = completion_loss(QUESTIONS, respond(runner, SampleLog(path), listener))

    assert scores == whole
    assert len(runner.asked) == len(ITEMS) - 4
    assert listener.phases == {"parrot gsm8k": len(ITEMS) - 4}
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({line["key"] for line in lines}) == len(lines) == 2 * len(ITEMS)
    assert lines[-1]["target"] == ITEMS[-1].completion
    assert {line["model"] for line in lines} == {"parrot"}


def test_a_finished_run_asks_nothing_and_says_so(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    completion_loss(QUESTIONS, respond(Parrot(), SampleLog(path)))
    before, runner, listener = path.read_bytes(), Parrot(), Recorder()

    completion_loss(QUESTIONS, respond(runner, SampleLog(path), listener))

    assert runner.asked == []
    assert listener.notes == ["parrot gsm8k: taken from the sample log"]
    assert path.read_bytes() == before


def test_what_a_model_says_is_in_the_log_as_it_says_it(tmp_path: Path) -> None:
    path, answer = tmp_path / "log.jsonl", "Zürich\u2028\r\n\x85 7"
    prompt = Prompt((1,), 4, ())
    respond(Parrot(answer), SampleLog(path)).texts("gsm8k", [0], [prompt])
    again = Parrot()

    (text,) = respond(again, SampleLog(path)).texts("gsm8k", [0], [prompt])

    assert (text, again.asked) == (answer, [])
    assert "Zürich" in path.read_text(encoding="utf-8")


def test_every_window_has_its_loss_in_the_log(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"

    perplexity("c4", ["abcdefgh"], 3, None, respond(Parrot(), SampleLog(path)))

    lines = [json.loads(line) for line in path.read_text().splitlines()]
    scored = [line for line in lines if line.get("metric") == "loss"]
    assert [(line["item"], line["value"]) for line in scored] == [(0, 0.5), (1, 0.5)]


def test_another_model_is_asked_anew(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    completion_loss(QUESTIONS, respond(Parrot(), SampleLog(path)))
    other = Parrot()
    other.identity = "other"

    completion_loss(QUESTIONS, respond(other, SampleLog(path)))

    assert len(other.asked) == len(ITEMS)


@pytest.mark.parametrize("text", ["text", '{"prompt": "a"}'])
def test_a_file_of_one_line_without_its_end_is_left_alone(
    tmp_path: Path, text: str
) -> None:
    path = tmp_path / "task.jsonl"
    path.write_text(text)

    with pytest.raises(EvaluateError, match="no line of a sample log"):
        SampleLog(path)

    assert path.read_text() == text


@pytest.mark.parametrize("line", ["text", "[1]", "1", '{"no": "key"}', "[" * 9999])
def test_a_file_that_is_no_log(tmp_path: Path, line: str) -> None:
    path = tmp_path / "notes.txt"
    path.write_text(f"{line}\n")

    with pytest.raises(EvaluateError, match="line 1: not a line of a sample log"):
        SampleLog(path)

    assert path.read_text() == f"{line}\n"
