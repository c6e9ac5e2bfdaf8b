"""Stopping what runs at a chosen moment, as Ctrl-C would."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tacq_vllm.quantize.workdir import PhaseFolder


@contextmanager
def interrupted_at_file(count: int) -> Iterator[None]:
    """Stop the body where its n-th file would get its name."""
    seen = 0

    def replace(source: Path, target: Path) -> None:
        nonlocal seen
        seen += 1
        if seen == count:
            raise KeyboardInterrupt
        os.rename(source, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", replace)
        with suppress(KeyboardInterrupt):
            yield
    assert seen == count, "there are not so many files"


@contextmanager
def interrupted_at_removal(count: int) -> Iterator[None]:
    """Stop the body where it would remove its n-th file of a phase."""
    seen, remove = 0, PhaseFolder.remove

    def stop(folder: PhaseFolder, name: str) -> None:
        nonlocal seen
        seen += 1
        if seen == count:
            raise KeyboardInterrupt
        remove(folder, name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PhaseFolder, "remove", stop)
        with suppress(KeyboardInterrupt):
            yield
    assert seen == count, "there are not so many removals"
