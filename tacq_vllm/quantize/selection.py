"""One global budget to per-linear masks, without the model in one tensor.

The exact top k of all scores is found from two histograms of their bit patterns: for
floats of zero or more, integer order of the bits is numerical order.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

_HALF = 16


@dataclass(frozen=True)
class Selection:
    """The k highest scores: all above a threshold, and the first ties in order."""

    threshold: int
    """Bit pattern of the lowest score selected."""
    ties: dict[str, int]
    """Scores equal to the threshold that each linear selects, in row order."""

    def mask(self, name: str, scores: Tensor) -> Tensor:
        """The selected weights of one linear: bool, shaped as its scores [out, in]."""
        bits = _bits(scores)
        mask = bits > self.threshold
        if self.ties.get(name):
            equal = (bits == self.threshold).flatten().nonzero()[: self.ties[name], 0]
            mask.view(-1)[equal] = True
        return mask


def select_top(
    names: Iterable[str], scores_of: Callable[[str], Tensor], count: int
) -> Selection:
    """Select the `count` highest scores over all linears.

    Every linear's scores (float32, zero or more, finite) are asked for three times and
    held one at a time. Of equal scores at the threshold the first in order are taken.
    """
    names = list(names)
    if count <= 0:
        return Selection(threshold=torch.iinfo(torch.int32).max, ties={})

    high = _histogram(names, scores_of, lambda bits: bits >> _HALF)
    high_digit, above = _digit_at(high, count)
    low = _histogram(
        names,
        scores_of,
        lambda bits: bits[(bits >> _HALF) == high_digit] & ((1 << _HALF) - 1),
    )
    low_digit, above_low = _digit_at(low, count - above)
    threshold = (high_digit << _HALF) | low_digit

    wanted = count - above - above_low
    ties: dict[str, int] = {}
    for name in names:
        if wanted == 0:
            break
        equal = int((_bits(scores_of(name)) == threshold).sum())
        ties[name] = min(equal, wanted)
        wanted -= ties[name]
    return Selection(threshold, ties)


def _bits(scores: Tensor) -> Tensor:
    # Negative zero would sort below everything; adding zero makes it positive.
    return (scores.contiguous() + 0.0).view(torch.int32)


def _histogram(
    names: list[str],
    scores_of: Callable[[str], Tensor],
    digit: Callable[[Tensor], Tensor],
) -> Tensor:
    counts = torch.zeros(1 << _HALF, dtype=torch.int64)
    for name in names:
        digits = digit(_bits(scores_of(name)).flatten())
        counts += torch.bincount(digits, minlength=1 << _HALF).cpu()
    return counts


def _digit_at(counts: Tensor, rank: int) -> tuple[int, int]:
    """The digit of the rank-th highest value, and how many values are above it."""
    from_top = counts.flip(0).cumsum(0)
    index = int(torch.searchsorted(from_top, rank))
    digit = counts.numel() - 1 - index
    return digit, int(from_top[index]) - int(counts[digit])
