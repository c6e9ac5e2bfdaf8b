"""How progress and failures look; what Ctrl-C does."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from typer.core import TyperGroup

if TYPE_CHECKING:
    from tacq_vllm.quantize.progress import Listener

# The base of all that Typer says of arguments, which it exports under no name.
_UsageError: Any = typer.BadParameter.__base__

out = Console()
err = Console(stderr=True, soft_wrap=True)


INTERRUPTED = "interrupted; the same command finishes what this one began"
INTERRUPTED_CODE = 130


class RichListener:
    """A progress bar per phase, for a terminal."""

    def __init__(self, bars: Progress) -> None:
        self._bars = bars
        self._tasks: dict[str, TaskID] = {}

    def phase_started(self, name: str, total: int) -> None:
        """Add a bar."""
        self._tasks[name] = self._bars.add_task(name, total=total, detail="")

    def phase_advanced(self, name: str, steps: int, detail: str) -> None:
        """Move the bar."""
        self._bars.update(self._tasks[name], advance=steps, detail=detail)

    def phase_finished(self, name: str, seconds: float) -> None:
        """Leave the bar full."""
        self._bars.update(self._tasks[name], detail="")

    def noted(self, text: str) -> None:
        """Print the line above the bars."""
        self._bars.console.print(text, highlight=False, markup=False)


class LogListener:
    """A plain line per step, with time left, for a log file."""

    def __init__(self) -> None:
        self._total = self._done = 0
        self._start = 0.0

    def phase_started(self, name: str, total: int) -> None:
        """Begin counting."""
        self._total, self._done, self._start = total, 0, perf_counter()
        err.print(f"{name}: {total} steps", highlight=False, markup=False)

    def phase_advanced(self, name: str, steps: int, detail: str) -> None:
        """Print the step."""
        self._done += steps
        left = (perf_counter() - self._start) / self._done * (self._total - self._done)
        parts = (f"{name} {self._done}/{self._total}", detail, f"{left:.0f} s left")
        err.print("  ".join(filter(None, parts)), highlight=False, markup=False)

    def phase_finished(self, name: str, seconds: float) -> None:
        """Print how long the phase took."""
        err.print(f"{name}: {seconds:.1f} s", highlight=False, markup=False)

    def noted(self, text: str) -> None:
        """Print the line."""
        err.print(text, highlight=False, markup=False)


@contextmanager
def open_listener(leads: bool) -> "Iterator[Listener | None]":
    """What shows the progress of a process; None where another one leads."""
    if not leads:
        yield None
        return
    if not err.is_terminal:
        yield LogListener()
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[detail]}", markup=False),
    )
    with Progress(*columns, console=err) as bars:
        yield RichListener(bars)


def print_failure(message: str) -> None:
    """Say in one line why a command ends."""
    line = " ".join(message.split())
    err.print(f"tacq: {line}", style="red", highlight=False, markup=False)


class CommandGroup(TyperGroup):
    """Commands; arguments that they do not take are bad input as any other."""

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        """Read what stands before the command."""
        with _usage_in_one_line():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: Any) -> Any:
        """Read what stands after the command, and run it."""
        with _usage_in_one_line():
            return super().invoke(ctx)


@contextmanager
def _usage_in_one_line() -> Iterator[None]:
    """Typer itself would print some five lines."""
    try:
        yield
    except _UsageError as error:
        reason = error.format_message().rstrip(".").replace("Value error, ", "")
        command = error.ctx.command_path if error.ctx else "tacq"
        # There is none where `tacq` alone has printed its help.
        if reason:
            print_failure(f"{reason}; see {command} --help")
        raise typer.Exit(error.exit_code) from error


@contextmanager
def ends_at_once() -> Iterator[None]:
    """Within the body Ctrl-C ends the process, without cleaning up.

    Python itself would first wait for the threads of the Hub's client.
    """

    def end(*_: object) -> None:
        print_failure(INTERRUPTED)
        os._exit(INTERRUPTED_CODE)

    before = signal.getsignal(signal.SIGINT)
    # A job in the background of a shell is told to ignore it.
    if before is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
