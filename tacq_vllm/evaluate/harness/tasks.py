"""The harness's tasks, and one run of them."""

import logging
from dataclasses import asdict
from importlib.resources import files
from typing import Any

import yaml
from datasets import Dataset
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import evaluate

from tacq_vllm.evaluate.harness.model import HarnessModel
from tacq_vllm.evaluate.questions import Questions
from tacq_vllm.evaluate.respondent import Respondent


def harness_values(questions: Questions, respondent: Respondent) -> list[float]:
    """What the harness's task gives each item: 1 where the answer is right, or 0.

    The task is the YAML file beside this one that has the set's name.
    """
    # It warns of options that a task of its own would have.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    config = _read_task(questions.task)
    (metric,) = (m["metric"] for m in config["metric_list"])
    data = {"custom_dataset": lambda: _docs(questions)}
    task = ConfigurableTask(config=config | data)
    results = evaluate(
        HarnessModel(respondent, questions.task),
        {config["task"]: task},
        bootstrap_iters=0,
        log_samples=True,
    )
    assert results is not None
    samples = results["samples"][config["task"]]
    value_of = {sample["doc"]["item"]: float(sample[metric]) for sample in samples}
    return [value_of[number] for number in questions.numbers]


def _read_task(name: str) -> dict[str, Any]:
    text = (files(__package__) / f"{name}.yaml").read_text(encoding="utf-8")
    config: dict[str, Any] = yaml.safe_load(text)
    return config


def _docs(questions: Questions) -> dict[str, Dataset]:
    rows = [
        {"item": number, **asdict(item)}
        for number, item in zip(questions.numbers, questions.items, strict=True)
    ]
    return {"evaluation": Dataset.from_list(rows)}
