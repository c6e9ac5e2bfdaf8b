"""What long work tells whoever watches; the work itself prints nothing."""

from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Protocol


class Listener(Protocol):
    """Receives the progress of a run."""

    def phase_started(self, name: str, total: int) -> None:
        """A phase of `total` steps begins."""

    def phase_advanced(self, name: str, steps: int, detail: str) -> None:
        """Steps of the phase are done; `detail` is one line about the last."""

    def phase_finished(self, name: str, seconds: float) -> None:
        """The phase is over."""

    def noted(self, text: str) -> None:
        """Something that the user should know: one line."""


class Phase:
    """A running phase; `advance` reports steps."""

    def __init__(self, name: str, listener: Listener | None) -> None:
        self._name = name
        self._listener = listener

    def advance(self, steps: int = 1, detail: str = "") -> None:
        """Report finished steps."""
        if self._listener is not None:
            self._listener.phase_advanced(self._name, steps, detail)


class Progress:
    """Times the phases of a run and tells them to a listener."""

    def __init__(self, listener: Listener | None = None) -> None:
        self.listener = listener
        self.seconds: dict[str, float] = {}
        """Wall time of each finished phase."""

    def note(self, text: str) -> None:
        """Tell the user a line."""
        if self.listener is not None:
            self.listener.noted(text)

    @contextmanager
    def phase(self, name: str, total: int) -> Iterator[Phase]:
        """Run the body as a phase of `total` steps."""
        if self.listener is not None:
            self.listener.phase_started(name, total)
        start = perf_counter()
        yield Phase(name, self.listener)
        self.seconds[name] = self.seconds.get(name, 0.0) + perf_counter() - start
        if self.listener is not None:
            self.listener.phase_finished(name, self.seconds[name])
