"""One way to break a checkpoint.

The good one is a frozen checkpoint: one block, 3 bits, or clusters.
"""

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from huggingface_hub.errors import StrictDataclassError

from tests.hostile.good import GOOD, shard

Reader = Literal["transformers", "vllm"]
REASON_OF_OTHERS = re.compile(r" \(Error while|: line \d| at line \d")
"""Where a parser's own words begin, which depend on the order of its tables."""

HOSTS_OWN = (
    AttributeError,
    ImportError,
    LookupError,
    OSError,
    RecursionError,
    StrictDataclassError,
    TypeError,
    ValueError,
)
"""What readers raise of their own, over JSON, what it says, or a missing file."""

BOTH: tuple[Reader, ...] = ("transformers", "vllm")


@dataclass(frozen=True)
class Kind:
    """One way to break a checkpoint."""

    name: str
    damage: Callable[[Path], None]
    parts: tuple[str, ...]
    """What the line has: file, tensor, reason."""
    host_first: tuple[Reader, ...] = ()
    """Those that parse what is broken themselves, before a plugin is asked."""
    is_sharded: bool = False
    source: Path = GOOD
    """The good one."""

    def make(self, folder: Path) -> Path:
        """Write a broken checkpoint."""
        shutil.copytree(self.source, folder)
        if self.is_sharded:
            shard(folder)
        self.damage(folder)
        return folder


def own_words(line: str) -> str:
    """A line without what a parser adds."""
    return REASON_OF_OTHERS.split(line)[0]
