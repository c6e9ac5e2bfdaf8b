"""Execution accuracy of SQL on Spider's databases."""

from collections.abc import Sequence
from pathlib import Path

from tacq_vllm.evaluate.errors import EvaluateError
from tacq_vllm.evaluate.questions import Questions
from tacq_vllm.evaluate.respondent import Respondent
from tacq_vllm.evaluate.runner import Prompt
from tacq_vllm.evaluate.sql.judge import Judge
from tacq_vllm.scores import Score

_STOPS = (";", "\n\n", "\n--")
_MAX_TOKENS = 192
_QUERY_SECONDS = 10.0


def find_databases(questions: Questions, data_root: Path | None) -> dict[str, Path]:
    """The SQLite file of each database that is asked about.

    Raises:
        EvaluateError: one is missing.
    """
    if data_root is None:
        raise EvaluateError(
            "spider: the Hub has no databases to run queries on: give them with "
            "--data-root, or take the task spider-loss"
        )
    names = dict.fromkeys(item.group for item in questions.items)
    folder = data_root / "spider" / "database"
    files = {name: folder / name / f"{name}.sqlite" for name in names}
    for file in files.values():
        if not file.is_file():
            raise EvaluateError(f"spider: {file}: no such file")
    return files


def execution_accuracy(
    questions: Questions, databases: dict[str, Path], respondent: Respondent
) -> list[Score]:
    """Let the model write a query for each question, and run it.

    It is right if it gives the rows of the right query, in any order of the columns;
    their own order counts where the right query orders them.

    Raises:
        EvaluateError: a right query fails.
    """
    tokenizer = respondent.runner.tokenizer
    asked = [
        Prompt(tuple(tokenizer(item.prompt).input_ids), _MAX_TOKENS, _STOPS)
        for item in questions.items
    ]
    answers = respondent.texts(questions.task, questions.numbers, asked)
    verdicts = _judge(questions, databases, answers)
    values = [float(verdict == "right") for verdict in verdicts]
    return [questions.score("execution_accuracy", values, respondent, verdicts)]


def _judge(
    questions: Questions, databases: dict[str, Path], answers: Sequence[str]
) -> list[str]:
    verdicts = []
    with Judge(_QUERY_SECONDS) as judge:
        for item, answer in zip(questions.items, answers, strict=True):
            database = databases[item.group]
            verdict = judge.verdict(database, item.completion, answer.strip())
            if verdict.startswith("gold: "):
                raise EvaluateError(
                    f"spider: {database}: {item.completion!r} {verdict[6:]}"
                )
            verdicts.append(verdict)
    return verdicts
