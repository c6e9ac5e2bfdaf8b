"""All tasks on one model, and what the 16-bit model has beside it."""

from collections.abc import Mapping, Sequence
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


def check_baseline(baseline: Scores, settings: Mapping[str, str]) -> None:
    """Refuse a baseline that was measured in another way.

    Raises:
        EvaluateError: its settings are not these.
    """
    for name, value in settings.items():
        theirs = baseline.settings.get(name)
        if theirs != value:
            raise EvaluateError(
                f"the baseline was measured with {name} {theirs}, this model is to be "
                f"with {value}: measure both in the same way"
            )


def with_baseline(scores: Scores, baseline: Scores) -> Scores:
    """Put the 16-bit model's figures beside those of a model.

    Raises:
        EvaluateError: a figure of the model is not among the baseline's.
    """
    known = {(s.task, s.metric, s.limit): s.value for s in baseline.scores}
    rows = []
    for score in scores.scores:
        key = (score.task, score.metric, score.limit)
        if key not in known:
            extent = "" if score.limit is None else f" with limit {score.limit}"
            raise EvaluateError(
                f"the baseline has no {score.metric} of {score.task}{extent}"
            )
        rows.append(score.model_copy(update={"baseline": known[key]}))
    return scores.model_copy(update={"scores": tuple(rows)})
