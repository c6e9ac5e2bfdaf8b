"""A model that is asked item by item, each answer kept in the log."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from tacq_vllm.evaluate.errors import EvaluateError
from tacq_vllm.evaluate.runner import Continuation, Likelihood, Prompt, Runner
from tacq_vllm.evaluate.samples import SampleLog
from tacq_vllm.quantize.progress import Progress
from tacq_vllm.quantize.workdir import fingerprint

_Asked = TypeVar("_Asked", Continuation, Prompt)
_Answer = TypeVar("_Answer")


@dataclass(frozen=True)
class ItemScore:
    """What one item of a task has given."""

    item: int
    """Its number in the evaluation split."""
    value: float
    target: str
    """What was to be said."""
    detail: str = ""
    """Why it has this value, where that is not plain."""


class Respondent:
    """Asks a runner what the log does not know yet.

    Args:
        runner: the model.
        log: keeps the answers.
        progress: told of every answer.
    """

    def __init__(self, runner: Runner, log: SampleLog, progress: Progress) -> None:
        self.runner = runner
        self.progress = progress
        self._log = log

    def likelihoods(
        self, task: str, items: Sequence[int], asked: Sequence[Continuation]
    ) -> list[Likelihood]:
        """How likely each continuation is; an item may have several.

        Raises:
            EvaluateError: one is not finite.
        """
        cut = [self._fit(continuation) for continuation in asked]
        self._note_cuts(task, asked, cut)
        lines = self._answers(task, items, cut, self.runner.likelihoods, asdict)
        return [Likelihood(line["total"], line["greedy"]) for line in lines]

    def texts(
        self, task: str, items: Sequence[int], asked: Sequence[Prompt]
    ) -> list[str]:
        """The text that follows each prompt."""
        cut = [self._fit_prompt(prompt) for prompt in asked]
        self._note_cuts(task, [a.tokens for a in asked], [c.tokens for c in cut])
        self._note_short_answers(task, asked, cut)
        lines = self._answers(
            task, items, cut, self.runner.texts, lambda text: {"text": text}
        )
        return [str(line["text"]) for line in lines]

    def record(self, task: str, metric: str, scores: Iterable[ItemScore]) -> None:
        """Keep what each item has given."""
        for score in scores:
            line = {"task": task, "metric": metric, **asdict(score)}
            self._log.add(self._key(line), {"model": self.runner.name, **line})

    def _answers(
        self,
        task: str,
        items: Sequence[int],
        asked: Sequence[_Asked],
        ask: Callable[[Sequence[_Asked]], Iterator[_Answer]],
        fields: Callable[[_Answer], dict[str, Any]],
    ) -> list[dict[str, Any]]:
        keys = [self._key(asdict(one)) for one in asked]
        missing = {
            key: (item, one)
            for key, item, one in zip(keys, items, asked, strict=True)
            if self._log.get(key) is None
        }
        if missing:
            name = f"{self.runner.name} {task}"
            with self.progress.phase(name, len(missing)) as bar:
                answers = ask([one for _, one in missing.values()])
                for (key, (item, _)), answer in zip(
                    missing.items(), answers, strict=True
                ):
                    place = {"model": self.runner.name, "task": task, "item": item}
                    kept = place | fields(answer)
                    self._check_finite(kept)
                    self._log.add(key, kept)
                    bar.advance()
        elif asked:
            self.progress.note(f"{self.runner.name} {task}: taken from the sample log")
        return [line for key in keys if (line := self._log.get(key)) is not None]

    def _check_finite(self, line: dict[str, Any]) -> None:
        if not math.isfinite(line.get("total", 0.0)):
            raise EvaluateError(
                f"{line['model']} {line['task']}, item {line['item']}: its loss is not "
                f"finite in {self.runner.dtype}: use --dtype float32 or bfloat16; in "
                "those the weights are at fault"
            )

    def _key(self, content: dict[str, Any]) -> str:
        return fingerprint({"model": self.runner.identity, **content})[:32]

    def _fit(self, asked: Continuation) -> Continuation:
        """Cut on the left what the model has no room for."""
        room = self.runner.max_length - len(asked.tokens)
        if room < 1:
            raise EvaluateError(
                f"an answer of {len(asked.tokens)} tokens is to be scored, and "
                f"{self.runner.name} has room for {self.runner.max_length}: raise "
                "--max-length, or take a model with a longer context"
            )
        return Continuation(asked.context[-room:], asked.tokens)

    def _fit_prompt(self, asked: Prompt) -> Prompt:
        max_tokens = min(asked.max_tokens, self.runner.max_length // 2)
        room = self.runner.max_length - max_tokens
        return Prompt(asked.tokens[-room:], max_tokens, asked.stops)

    def _note_cuts(
        self, task: str, asked: Sequence[object], cut: Sequence[object]
    ) -> None:
        count = sum(a != b for a, b in zip(asked, cut, strict=True))
        if count:
            self.progress.note(
                f"{task}: {count} prompts and their answers are longer than the "
                f"{self.runner.max_length} tokens that there is room for: cut on the "
                "left"
            )

    def _note_short_answers(
        self, task: str, asked: Sequence[Prompt], cut: Sequence[Prompt]
    ) -> None:
        short = [
            f"{one.max_tokens}, not {whole.max_tokens}"
            for whole, one in zip(asked, cut, strict=True)
            if one.max_tokens < whole.max_tokens
        ]
        if short:
            self.progress.note(
                f"{task}: answers have at most {short[0]} tokens, half of the "
                f"{self.runner.max_length} that there is room for"
            )
