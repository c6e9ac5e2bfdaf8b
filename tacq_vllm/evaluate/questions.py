"""Items of a question set, and the loss on what should be answered."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tacq_vllm.data.sets import Item
from tacq_vllm.evaluate.errors import EvaluateError
from tacq_vllm.evaluate.respondent import ItemScore, Respondent
from tacq_vllm.evaluate.runner import Continuation
from tacq_vllm.evaluate.statistics import Mean
from tacq_vllm.scores import Score


@dataclass(frozen=True)
class Questions:
    """The items of a set that are asked."""

    task: str
    numbers: tuple[int, ...]
    """Of each item, in the whole split."""
    items: tuple[Item, ...]
    limit: int | None

    @classmethod
    def spread(cls, task: str, items: Sequence[Item], limit: int | None) -> "Questions":
        """As many items as the limit says, evenly over the whole split."""
        count = min(limit or len(items), len(items))
        numbers = tuple(i * len(items) // count for i in range(count))
        return cls(task, numbers, tuple(items[n] for n in numbers), limit)

    def score(
        self,
        metric: str,
        values: Sequence[float],
        respondent: Respondent,
        details: Sequence[str] = (),
    ) -> Score:
        """The mean over the items, of one value each, which are kept."""
        targets = [item.completion for item in self.items]
        told = details or [""] * len(values)
        scores = map(ItemScore, self.numbers, values, targets, told)
        respondent.record(self.task, metric, scores)
        mean = Mean.of(values)
        return Score(
            task=self.task,
            metric=metric,
            value=mean.value,
            stderr=mean.stderr,
            limit=self.limit,
        )


def completion_loss(questions: Questions, respondent: Respondent) -> list[Score]:
    """Score the tokens of the right answers: the mean over items of their mean loss."""
    tokenizer = respondent.runner.tokenizer
    asked = [encode(tokenizer, i.prompt, i.completion) for i in questions.items]
    answers = respondent.likelihoods(questions.task, questions.numbers, asked)
    losses = [
        -answer.total / len(continuation.tokens)
        for answer, continuation in zip(answers, asked, strict=True)
    ]
    return [questions.score("loss", losses, respondent)]


def encode(tokenizer: Any, prompt: str, completion: str) -> Continuation:
    """Tokens of both as one text, the completion being what the prompt alone lacks."""
    before = tokenizer(prompt).input_ids
    whole = tokenizer(prompt + completion).input_ids
    start = min(len(before), len(whole) - 1)
    while start > 1 and before[:start] != whole[:start]:
        start -= 1
    if start < 1:
        raise EvaluateError(f"no token to predict in {prompt + completion!r}")
    return Continuation(tuple(whole[:start]), tuple(whole[start:]))
