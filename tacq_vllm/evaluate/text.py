"""Perplexity of running text, in windows that do not overlap."""

import math
from collections.abc import Sequence
from typing import Any

from tacq_vllm.evaluate.errors import EvaluateError
from tacq_vllm.evaluate.respondent import ItemScore, Respondent
from tacq_vllm.evaluate.runner import Continuation
from tacq_vllm.evaluate.statistics import Mean
from tacq_vllm.scores import Score

_LARGEST_LOSS = 700.0
"""Of more the exponential is no float."""


def perplexity(
    task: str,
    documents: Sequence[str],
    window: int,
    limit: int | None,
    respondent: Respondent,
) -> list[Score]:
    """Score the text of all documents, tokenized as a whole.

    The first token of a window is not predicted; what is left after the last whole
    window is not used.

    Raises:
        EvaluateError: a window is too long for the model, or the text too short.
    """
    runner = respondent.runner
    if window > runner.max_length:
        raise EvaluateError(
            f"{task}: a window of {window} tokens, more than the {runner.max_length} "
            f"that there is room for in {runner.name}: choose a smaller --window"
        )
    # The last tokens depend on what follows them: a window more is read.
    needed = math.inf if limit is None else (limit + 1) * window
    ids = _tokenize(runner.tokenizer, documents, needed)
    count = len(ids) // window
    if count == 0:
        raise EvaluateError(
            f"{task}: {len(ids)} tokens of text, less than a window of {window}: "
            "choose a smaller --window"
        )
    numbers = range(count)[:limit]
    windows = [ids[n * window : (n + 1) * window] for n in numbers]
    asked = [Continuation(tuple(w[:1]), tuple(w[1:])) for w in windows]
    answers = respondent.likelihoods(task, numbers, asked)
    losses = [-answer.total / (window - 1) for answer in answers]
    scores = map(ItemScore, numbers, losses, [""] * len(losses))
    respondent.record(task, "loss", scores)
    mean = Mean.of(losses)
    if mean.value > _LARGEST_LOSS:
        raise EvaluateError(
            f"{task}: a loss of {mean.value:.0f} nats a token, too large for a "
            f"perplexity: the weights of {runner.name} are at fault"
        )
    value = math.exp(mean.value)
    return [
        Score(
            task=task,
            metric="perplexity",
            value=value,
            # The error of exp(x) is exp(x) times that of x, to first order.
            stderr=None if mean.stderr is None else value * mean.stderr,
            limit=limit,
        )
    ]


def _tokenize(tokenizer: Any, documents: Sequence[str], needed: float) -> list[int]:
    """At least as many tokens of the text as are needed, where it has so many."""
    count = len(documents) if needed == math.inf else 1
    while True:
        text = "\n\n".join(documents[:count])
        ids: list[int] = tokenizer(text, verbose=False).input_ids
        if len(ids) >= needed or count >= len(documents):
            return ids
        count *= 2
