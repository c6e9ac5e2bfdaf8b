"""All tasks on one model, and what the 16-bit model has beside it."""

from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version

from tacq_vllm.evaluate.errors import EvaluateError
from tacq_vllm.evaluate.respondent import Respondent
from tacq_vllm.evaluate.runner import Runner
from tacq_vllm.evaluate.samples import SampleLog
from tacq_vllm.evaluate.tasks import HARNESS_TASKS, Measure
from tacq_vllm.quantize.progress import Progress
from tacq_vllm.scores import Score, Scores


def evaluate_model(
    runner: Runner,
    tasks: Mapping[str, Sequence[Measure]],
    settings: Mapping[str, str],
    log: SampleLog,
    progress: Progress,
) -> Scores:
    """Measure a model.

    Args:
        runner: the model.
        tasks: from `load_tasks`.
        settings: of the backend and of the protocol, to be stored with the scores.
        log: keeps every answer; those that it has are not asked for again.
        progress: told of every answer.

    Raises:
        EvaluateError: a task does not fit the model.
    """
    respondent = Respondent(runner, log, progress)
    # Two tasks may give the same figure: gsm8k and gsm8k-loss.
    scores: dict[tuple[str, str], Score] = {}
    for measures in tasks.values():
        for measure in measures:
            for score in measure(respondent):
                scores[score.task, score.metric] = score
    harness = {}
    if any(name in HARNESS_TASKS for name in tasks):
        harness = {"lm-eval": version("lm-eval")}
    return Scores(
        scores=tuple(scores.values()),
        versions=runner.versions | harness,
        settings={"model": runner.name, **settings},
    )


def check_baseline(
    baseline: Scores,
    settings: Mapping[str, str],
    figures: Iterable[tuple[str, str]],
    limit: int | None,
) -> None:
    """Refuse a baseline that was measured in another way, or lacks a figure.

    Args:
        baseline: what a file has.
        settings: that a model is to be measured with.
        figures: its tasks and metrics.
        limit: of each.

    Raises:
        EvaluateError: the baseline cannot stand beside such scores.
    """
    for name, value in settings.items():
        theirs = baseline.settings.get(name)
        if theirs != value:
            raise EvaluateError(
                f"the baseline was measured with {name} {theirs}, this model is to be "
                f"with {value}: measure both in the same way"
            )
    known = {(s.task, s.metric, s.limit) for s in baseline.scores}
    for task, metric in figures:
        if (task, metric, limit) not in known:
            extent = "" if limit is None else f" with limit {limit}"
            raise EvaluateError(f"the baseline has no {metric} of {task}{extent}")


def with_baseline(scores: Scores, baseline: Scores) -> Scores:
    """Put the 16-bit model's figures, which have all these, beside those of a model."""
    known = {(s.task, s.metric, s.limit): s.value for s in baseline.scores}
    rows = [
        score.model_copy(
            update={"baseline": known[score.task, score.metric, score.limit]}
        )
        for score in scores.scores
    ]
    return scores.model_copy(update={"scores": tuple(rows)})
