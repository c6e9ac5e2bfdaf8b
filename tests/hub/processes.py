"""Processes that read their environment anew, but have imported most of what is slow.

The Hub's client takes its settings from the environment when it is imported. These
processes are forks of one that has imported what takes seconds and is not the client.
"""

import multiprocessing
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(
    ["torch", "torch._dynamo", "torch.distributed.tensor", "sklearn.metrics", "numba"]
)


@dataclass(frozen=True)
class Finished:
    """What a process, or a command in one, has left."""

    exit_code: int
    stdout: str
    stderr: str


def run(code: str, environment: dict[str, str], *arguments: str) -> Finished:
    """Run code to its end."""
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder, name) for name in ("stdout", "stderr")]
        process = _FORKS.Process(
            target=_execute, args=(code, environment, arguments, outputs)
        )
        process.start()
        process.join()
        assert process.exitcode is not None
        return Finished(process.exitcode, *(output.read_text() for output in outputs))


def _execute(
    code: str,
    environment: dict[str, str],
    arguments: tuple[str, ...],
    outputs: list[Path],
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    for stream, output in enumerate(outputs, start=1):
        with output.open("wb") as file:
            os.dup2(file.fileno(), stream)
    sys.argv = ["-c", *arguments]
    exec(code, {"__name__": "__main__"})
