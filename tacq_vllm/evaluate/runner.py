"""What a model is asked, whatever runs it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class Continuation:
    """Tokens whose likelihood after others is asked for."""

    context: tuple[int, ...]
    """At least one."""
    tokens: tuple[int, ...]
    """At least one."""


@dataclass(frozen=True)
class Likelihood:
    """How likely a continuation is."""

    total: float
    """Sum of the tokens' log-probabilities, in nats."""
    greedy: bool
    """Whether every token is the likeliest in its place."""


@dataclass(frozen=True)
class Prompt:
    """Tokens that are to be continued greedily."""

    tokens: tuple[int, ...]
    max_tokens: int
    """New tokens, at most."""
    stops: tuple[str, ...]
    """Texts that end the answer, and are not part of it."""


class Runner(Protocol):
    """A model that answers, in the order of what it is asked."""

    @property
    def name(self) -> str:
        """What people call the model."""

    @property
    def identity(self) -> str:
        """Changes with the model's files, the arithmetic and the engine."""

    @property
    def dtype(self) -> str:
        """Of weights and activations, as --dtype names it."""

    @property
    def versions(self) -> dict[str, str]:
        """Version of each package that takes part, by its name."""

    @property
    def tokenizer(self) -> Any:
        """The model's."""

    @property
    def max_length(self) -> int:
        """Tokens of a prompt and its answer together, at most."""

    def likelihoods(self, asked: Sequence[Continuation]) -> Iterator[Likelihood]:
        """How likely each continuation is."""

    def texts(self, asked: Sequence[Prompt]) -> Iterator[str]:
        """The text that follows each prompt."""


def cut_at_stop(text: str, stops: Sequence[str]) -> str:
    """The text before the first of the texts that end it."""
    return text[: min((text.find(s) for s in stops if s in text), default=len(text))]
