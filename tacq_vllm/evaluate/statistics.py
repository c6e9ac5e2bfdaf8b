"""A mean over items and how sure it is."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Self


@dataclass(frozen=True)
class Mean:
    """A mean and its standard error."""

    value: float
    stderr: float | None
    """None for a single item."""

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        """Of one value an item."""
        if len(values) < 2:
            return cls(fmean(values), None)
        return cls(fmean(values), stdev(values) / math.sqrt(len(values)))
