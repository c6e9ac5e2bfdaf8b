"""Rows of the question sets to a prompt and its completion.

A prompt and its completion are joined as they stand. The space between them opens the
completion, as tokenizers cut words, and no prompt ends in one.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

_CALCULATOR_MARK = re.compile(r"<<[^<>]*>>")


@dataclass(frozen=True)
class MultipleChoice:
    """A question of MMLU."""

    question: str
    choices: tuple[str, str, str, str]
    answer: str
    """A, B, C or D."""


@dataclass(frozen=True)
class WordProblem:
    """A question of GSM8K with its worked answer, whose last line is `#### N`."""

    question: str
    answer: str


def format_mmlu(
    subject: str, shots: Iterable[MultipleChoice], asked: MultipleChoice
) -> tuple[str, str]:
    """Solved questions, then the one that is asked; the completion is its letter.

    Args:
        subject: as the data spells it, with underscores.
        shots: solved questions of the same subject.
        asked: the question to answer.
    """
    topic = subject.replace("_", " ")
    header = (
        f"The following are multiple choice questions (with answers) about {topic}.\n\n"
    )
    solved = "".join(f"{_ask_choice(shot)} {shot.answer}\n\n" for shot in shots)
    return header + solved + _ask_choice(asked), f" {asked.answer}"


def format_gsm8k(shots: Iterable[WordProblem], asked: WordProblem) -> tuple[str, str]:
    """Worked problems, then the one that is asked; the completion is its working."""
    solved = "".join(f"{_ask_problem(shot)}{_working(shot)}\n\n" for shot in shots)
    return solved + _ask_problem(asked), _working(asked)


def format_spider(ddl: str, question: str, query: str) -> tuple[str, str]:
    """A database's CREATE TABLE text and a question; the completion is the query.

    The prompt ends a line, so the completion opens without a space.
    """
    return f"{ddl.rstrip()}\n\n-- Question: {question}\n-- SQL:\n", query


def _ask_choice(item: MultipleChoice) -> str:
    choices = zip("ABCD", item.choices, strict=True)
    lines = [f"{letter}. {choice}" for letter, choice in choices]
    return "\n".join([item.question.strip(), *lines, "Answer:"])


def _ask_problem(item: WordProblem) -> str:
    return f"Question: {item.question}\nAnswer:"


def _working(item: WordProblem) -> str:
    return " " + _CALCULATOR_MARK.sub("", item.answer)
