"""Commands of `tacq` in processes of their own, which may be stopped at any moment.

A server that has imported everything and computed nothing makes them: they take no
longer than their work, and inherit no threads of PyTorch's.
"""

import multiprocessing
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from tacq_vllm.cli import app

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        "matplotlib.backends.backend_agg",
        "tacq_vllm.compare.pictures",
        "tacq_vllm.compare.report",
        "tacq_vllm.compare.run",
        "tacq_vllm.convert.importing",
        "tacq_vllm.evaluate.transformers_runner",
        "tacq_vllm.kernels.cpu_int8",
        "tacq_vllm.recover.pipeline",
        "tests.processes",
        "transformers.models.llama.modeling_llama",
    ]
)

Before = Callable[[], None]
"""What a process does first; a function of a module, or a `partial` of one."""


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    exit_code: int
    """Negative: of the signal that killed it."""
    words: str
    """All that it said."""

    @property
    def last_line(self) -> str:
        return self.words.splitlines()[-1]


def run(arguments: list[str], before: Before | None = None) -> Outcome:
    """Run a command to its end."""
    with tempfile.NamedTemporaryFile("r") as words:
        process = _CONTEXT.Process(target=_run, args=(arguments, words.name, before))
        process.start()
        process.join()
        assert process.exitcode is not None
        return Outcome(process.exitcode, words.read())


def _run(arguments: list[str], words: str, before: Before | None) -> None:
    sys.stdout = sys.stderr = open(words, "w", buffering=1)  # noqa: SIM115
    # Jobs in the background of a shell are told to ignore it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if before is not None:
        before()
    app(arguments)


def signal_at(count: int, number: signal.Signals) -> Before:
    """Send a signal at the n-th time that something is made or renamed."""
    return partial(_watch, count, number)


def _watch(count: int, number: signal.Signals) -> None:
    seen = 0

    def on_event(event: str, values: tuple[object, ...]) -> None:
        nonlocal seen
        makes = event == "open" and isinstance(values[1], str) and "w" in values[1]
        if makes or event in ("os.mkdir", "os.rename", "os.chmod"):
            seen += 1
            if seen == count:
                os.kill(os.getpid(), number)

    sys.addaudithook(on_event)
