"""A respondent as lm-evaluation-harness asks a model."""

from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from tacq_vllm.evaluate.questions import encode
from tacq_vllm.evaluate.respondent import Respondent
from tacq_vllm.evaluate.runner import Prompt


class HarnessModel(LM):  # type: ignore[misc]
    """Hands the harness's requests on; each names the item that it is about.

    Args:
        respondent: the model.
        task: whose items are asked.
    """

    def __init__(self, respondent: Respondent, task: str) -> None:
        super().__init__()
        self._respondent = respondent
        self._task = task

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """How likely each continuation is, and whether it is the likeliest."""
        tokenizer = self._respondent.runner.tokenizer
        asked = [encode(tokenizer, *request.args) for request in requests]
        answers = self._respondent.likelihoods(self._task, _items(requests), asked)
        return [(answer.total, answer.greedy) for answer in answers]

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """The greedy text after each prompt, up to what ends it."""
        asked = [self._prompt(*request.args) for request in requests]
        return self._respondent.texts(self._task, _items(requests), asked)

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Not asked for by the tasks here."""
        raise NotImplementedError

    def _prompt(self, text: str, options: dict[str, Any]) -> Prompt:
        return Prompt(
            tokens=tuple(self._respondent.runner.tokenizer(text).input_ids),
            max_tokens=options["max_gen_toks"],
            stops=tuple(options["until"]),
        )


def _items(requests: list[Instance]) -> list[int]:
    return [request.doc["item"] for request in requests]
