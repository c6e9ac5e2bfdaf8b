"""Token samples, and how text, tasks and chats become them."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, ClassVar

import torch
from torch import Tensor

from tacq_vllm.data.files import read_json_lines, read_text
from tacq_vllm.data.sets import NAMED_SETS, load_named_set
from tacq_vllm.quantize.errors import QuantizeError

Span = tuple[int, int]
"""The first character, and the one after the last."""


@dataclass(frozen=True)
class Sample:
    """Tokens that go through the model together."""

    UNSCORED: ClassVar[int] = -100

    tokens: Tensor
    """int64 [n]."""
    scored: Tensor
    """bool [n]: the tokens whose prediction counts in the loss."""

    @classmethod
    def of(cls, tokens: Tensor) -> "Sample":
        """A sample of tokens, int64 [n], all of which count."""
        return cls(tokens, torch.ones_like(tokens, dtype=torch.bool))

    def targets(self) -> Tensor:
        """What each token but the last is to predict: int64 [n - 1], or UNSCORED."""
        return self.tokens[1:].masked_fill(~self.scored[1:], self.UNSCORED)


@dataclass(frozen=True)
class SourceSamples:
    """What a calibration source holds, in a seeded order, tokenized when asked for."""

    samples: Iterator[Sample]
    is_text: bool
    """Running text, to be cut into windows; otherwise every sample stays whole."""


class SampleReader:
    """Reads calibration sources with a model's tokenizer.

    Args:
        tokenizer: the model's.
        completions_only: score the tokens of completions and of an assistant's turns
            alone; in running text every token counts all the same.
        data_root: folder of the named sets, or None for the Hub.
        seed: of the samples' order.
    """

    def __init__(
        self,
        tokenizer: Any,
        completions_only: bool,
        data_root: Path | None,
        seed: int,
    ) -> None:
        self._tokenizer = tokenizer
        self._completions_only = completions_only
        self._data_root = data_root
        self._seed = seed

    def read(self, source: str) -> SourceSamples:
        """Read a named set or a file.

        Raises:
            DataError: the set or the file cannot be read.
            QuantizeError: a sample is malformed.
        """
        if source not in NAMED_SETS:
            return self._read_file(Path(source))
        named = load_named_set(source, "calibration", self._data_root)
        texts = [partial(self._sample, text) for text in named.documents]
        questions = [
            partial(self._completion, item.prompt, item.completion, source)
            for item in named.items
        ]
        return self._shuffled(texts or questions, is_text=bool(texts))

    def _read_file(self, path: Path) -> SourceSamples:
        kind = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
        if kind == ".txt":
            text = partial(self._sample, read_text(path))
            return self._shuffled([text], is_text=True)
        if kind != ".jsonl":
            raise QuantizeError(
                f"calibration source {str(path)!r}: neither `self`, nor one of "
                f"{', '.join(NAMED_SETS)}, nor a .txt or .jsonl file (.gz)"
            )
        lines = list(read_json_lines(path))
        samples = [self._line(line, where) for where, line in lines]
        is_text = all("text" in line for _, line in lines)
        return self._shuffled(samples, is_text=is_text)

    def _shuffled(
        self, samples: Sequence[Callable[[], Sample]], *, is_text: bool
    ) -> SourceSamples:
        order = Random(self._seed).sample(samples, len(samples))
        return SourceSamples((sample() for sample in order), is_text)

    def _line(self, line: Any, where: str) -> Callable[[], Sample]:
        match line:
            case {"text": str(text)}:
                return partial(self._sample, text)
            case {"prompt": str(prompt), "completion": str(completion)}:
                return partial(self._completion, prompt, completion, where)
            case {"messages": list(messages)} if all(
                isinstance(message, dict) for message in messages
            ):
                return partial(self._chat, messages, where)
        raise QuantizeError(
            f"{where}: none of `text`, `prompt` with `completion`, or `messages`"
        )

    def _completion(self, prompt: str, completion: str, where: str) -> Sample:
        text = prompt + completion
        return self._scored_sample(text, [(len(prompt), len(text))], where)

    def _chat(self, messages: list[Any], where: str) -> Sample:
        text = render_chat(self._tokenizer, messages, where)
        spans = []
        for index, message in enumerate(messages):
            if self._completions_only and message.get("role") == "assistant":
                render = partial(render_chat, self._tokenizer, where=where)
                before = render(messages[:index], answer_next=True) if index else ""
                until = render(messages[: index + 1])
                if not (text.startswith(before) and text.startswith(until)):
                    raise QuantizeError(
                        f"{where}: the chat template does not write a chat turn by "
                        "turn, so that the assistant's turns cannot be told apart"
                    )
                spans.append((len(before), len(until)))
        # The template writes the special tokens itself.
        return self._scored_sample(text, spans, where, add_special_tokens=False)

    def _scored_sample(
        self, text: str, spans: list[Span], where: str, **options: bool
    ) -> Sample:
        if not self._completions_only:
            return self._sample(text, **options)
        if not self._tokenizer.is_fast:
            raise QuantizeError(
                "the tokenizer does not tell which characters a token stands for: "
                "loss `completion` cannot be used"
            )
        encoded = self._tokenizer(text, return_offsets_mapping=True, **options)
        scored = [
            any(start <= first < last <= stop for start, stop in spans)
            for first, last in encoded.offset_mapping
        ]
        if not any(scored[1:]):
            raise QuantizeError(f"{where}: no token of a completion to score")
        return Sample(torch.tensor(encoded.input_ids), torch.tensor(scored))

    def _sample(self, text: str, **options: bool) -> Sample:
        ids = self._tokenizer(text, **options).input_ids
        return Sample.of(torch.tensor(ids, dtype=torch.int64))


def join_tokens(samples: Iterable[Sample]) -> Tensor:
    """The tokens of all samples in a row: int64 [n]."""
    parts = [sample.tokens for sample in samples]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)


def render_chat(
    tokenizer: Any, messages: list[Any], where: str, *, answer_next: bool = False
) -> str:
    """Write a chat through the model's template.

    Args:
        tokenizer: has the template.
        messages: with `role` and `content` each.
        where: what an error calls the chat.
        answer_next: end with what opens the assistant's turn.

    Raises:
        QuantizeError: the template fails.
    """
    try:
        return str(
            tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=answer_next
            )
        )
    except Exception as error:  # A template is a program: it may fail in any way.
        reason = " ".join(str(error).split())
        raise QuantizeError(f"{where}: the chat template fails: {reason}") from error
