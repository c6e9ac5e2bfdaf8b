"""The tasks by name: data read first, so that a wrong name costs no time."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tacq_vllm.data.sets import load_named_set
from tacq_vllm.evaluate.errors import EvaluateError
from tacq_vllm.evaluate.questions import Questions, completion_loss
from tacq_vllm.evaluate.respondent import Respondent
from tacq_vllm.evaluate.spider import execution_accuracy, find_databases
from tacq_vllm.evaluate.text import perplexity
from tacq_vllm.scores import Score

HARNESS_TASKS = ("mmlu", "gsm8k")
"""What lm-evaluation-harness takes part in."""

_MMLU_CHANCE = 0.25


@dataclass(frozen=True)
class Protocol:
    """What is measured, and on how much."""

    data_root: Path | None
    """Folder of the named sets; None: the Hub."""
    limit: int | None
    """Windows of each text and items of each question set; None: all."""
    window: int
    """Tokens of a window of text."""

    @property
    def settings(self) -> dict[str, str]:
        """What scores that are compared must have in common."""
        return {
            "data": "Hub" if self.data_root is None else "folder",
            "window": str(self.window),
        }


Measure = Callable[[Respondent], list[Score]]
"""Asks a model the items of a task, and gives one metric or several."""

Grader = Callable[[Questions, Respondent], list[float]]
"""Asks a model some questions, and gives 1 for each right answer and 0 for others."""


def load_tasks(names: Sequence[str], protocol: Protocol) -> dict[str, list[Measure]]:
    """Read the data of tasks.

    Raises:
        EvaluateError: a task is unknown, or lacks a package or a database.
        DataError: its data cannot be read.
    """
    known = ", ".join(_LOADERS)
    for name in names:
        if name not in _LOADERS:
            raise EvaluateError(f"{name}: no such task; there are {known}")
    if not names:
        raise EvaluateError(f"no task is given; there are {known}")
    return {name: _LOADERS[name](name, protocol) for name in names}


def figures(names: Iterable[str]) -> list[tuple[str, str]]:
    """The tasks and metrics that known tasks give scores of."""
    return [
        (name.removesuffix(_LOSS), metric)
        for name in names
        for metric in _METRICS.get(name, ("loss",))
    ]


def _text(name: str, protocol: Protocol) -> list[Measure]:
    documents = load_named_set(name, "evaluation", protocol.data_root).documents
    return [partial(perplexity, name, documents, protocol.window, protocol.limit)]


def _questions(name: str, protocol: Protocol) -> Questions:
    task = name.removesuffix(_LOSS)
    items = load_named_set(task, "evaluation", protocol.data_root).items
    return Questions.spread(task, items, protocol.limit)


def _loss(name: str, protocol: Protocol) -> list[Measure]:
    return [partial(completion_loss, _questions(name, protocol))]


def _mmlu(name: str, protocol: Protocol) -> list[Measure]:
    questions = _questions(name, protocol)
    return [
        partial(_graded, _harness(), questions, "accuracy", _MMLU_CHANCE),
        partial(completion_loss, questions),
    ]


def _gsm8k(name: str, protocol: Protocol) -> list[Measure]:
    questions = _questions(name, protocol)
    return [
        partial(completion_loss, questions),
        partial(_graded, _harness(), questions, "exact_match", None),
    ]


def _harness() -> Grader:
    try:
        from tacq_vllm.evaluate.harness.tasks import harness_values
    except ImportError as error:
        raise EvaluateError(
            f"mmlu and gsm8k need lm-evaluation-harness ({error}): pip install "
            "'tacq-vllm[eval]', or take the tasks mmlu-loss and gsm8k-loss"
        ) from error
    return harness_values


def _graded(
    grade: Grader,
    questions: Questions,
    metric: str,
    chance: float | None,
    respondent: Respondent,
) -> list[Score]:
    score = questions.score(metric, grade(questions, respondent), respondent)
    return [score.model_copy(update={"chance": chance})]


def _spider(name: str, protocol: Protocol) -> list[Measure]:
    questions = _questions(name, protocol)
    databases = find_databases(questions, protocol.data_root)
    return [
        partial(completion_loss, questions),
        partial(execution_accuracy, questions, databases),
    ]


_LOSS = "-loss"
_LOADERS: dict[str, Callable[[str, Protocol], list[Measure]]] = {
    "wikitext2": _text,
    "c4": _text,
    "mmlu": _mmlu,
    "gsm8k": _gsm8k,
    "spider": _spider,
    **{name + _LOSS: _loss for name in ("mmlu", "gsm8k", "spider")},
}
"""A question set's loss alone takes no generation."""

_METRICS = {
    "wikitext2": ("perplexity",),
    "c4": ("perplexity",),
    "mmlu": ("accuracy", "loss"),
    "gsm8k": ("loss", "exact_match"),
    "spider": ("loss", "execution_accuracy"),
}
"""Where it is not the loss alone."""
