"""The beginning that sequences share, put through a model once for all of them.

Few-shot prompts are mostly the same examples over and over.
"""

from collections.abc import Sequence
from copy import deepcopy
from inspect import signature
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

Tokens = tuple[int, ...]


class Stem:
    """Keeps what attention needs of the last shared beginning.

    It is copied for each sequence, not cut back after it: a sliding window or a
    recurrent state cannot be taken back.

    Args:
        model: a causal language model.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        # Since Transformers 5.24 models call it `cache`.
        accepted = signature(model.forward).parameters
        self._keyword = "cache" if "cache" in accepted else "past_key_values"
        self._tokens: Tokens = ()
        self._cache = DynamicCache(config=model.config)

    def logits(self, tokens: Tokens, count: int, following: Sequence[Tokens]) -> Tensor:
        """What is predicted after each of the last tokens of a sequence.

        Args:
            tokens: the sequence.
            count: how many of its tokens.
            following: sequences that will be asked for next.

        Returns:
            float32 [count, vocabulary].
        """
        sharable = tokens[:-count]
        if not self._serves(sharable, following):
            self._grow(sharable[: _shared_by_run(sharable, following)])
        cache = deepcopy(self._cache)
        logits: Tensor = self._run(tokens[len(self._tokens) :], cache, count)
        return logits[0, -count:].float()

    def _serves(self, tokens: Tokens, following: Sequence[Tokens]) -> bool:
        """Whether a stem of this sequence could not be much longer."""
        if tokens[: len(self._tokens)] != self._tokens:
            return False
        possible = _shared(tokens, following[0]) if following else 0
        return possible <= 2 * len(self._tokens)

    def _grow(self, tokens: Tokens) -> None:
        self._tokens = tokens
        self._cache = DynamicCache(config=self._model.config)
        if tokens:
            self._run(tokens, self._cache, 1)

    def _run(self, tokens: Tokens, cache: DynamicCache, count: int) -> Tensor:
        output = self._model(
            torch.tensor([tokens], device=self._model.device),
            use_cache=True,
            logits_to_keep=count,
            **{self._keyword: cache},
        )
        logits: Tensor = output.logits
        return logits


def _shared(tokens: Tokens, others: Tokens) -> int:
    """Tokens with which both begin."""
    pairs = zip(tokens, others, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _shared_by_run(tokens: Tokens, following: Sequence[Tokens]) -> int:
    """Tokens with which a sequence and the next ones begin.

    Two neighbours may share a word more than the rest of a run does; a sequence that
    shares less than half of that is of another run.
    """
    if not following:
        return 0
    length = _shared(tokens, following[0])
    for others in following[1:]:
        shared = _shared(tokens[:length], others)
        if 2 * shared < length:
            break
        length = shared
    return length
