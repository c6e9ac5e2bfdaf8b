"""Processes that import the Hub's client anew, but little else that takes long.

The client reads its settings from the environment when it is imported: a program, this
module, imports the rest, and each process of `tests.forking` the client.
"""

import importlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.forking import answer_requests, ask

_ROOT = Path(__file__).parents[2]
_SLOW_IMPORTS = [
    "torch._dynamo",
    "torch.distributed.tensor",
    "sklearn.metrics",
    "numba",
]


@dataclass(frozen=True)
class Finished:
    """What a process, or a command in one, has left."""

    exit_code: int
    stdout: str
    stderr: str


class Processes:
    """The program that makes them."""

    def __init__(self, program: "subprocess.Popen[str]") -> None:
        self._program = program

    def run(self, code: str, environment: dict[str, str], *arguments: str) -> Finished:
        """Run code to its end."""
        with tempfile.TemporaryDirectory() as folder:
            outputs = [Path(folder, name) for name in ("stdout", "stderr")]
            exit_code = ask(
                self._program,
                code=code,
                environment=environment,
                arguments=arguments,
                outputs=[str(output) for output in outputs],
            )
            return Finished(exit_code, *(output.read_text() for output in outputs))


@contextmanager
def hub_processes() -> Iterator[Processes]:
    """Start the program; it ends with the body."""
    with subprocess.Popen(
        [sys.executable, "-m", "tests.hub.processes"],
        cwd=_ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as program:
        yield Processes(program)


def _execute(
    code: str, environment: dict[str, str], arguments: list[str], outputs: list[str]
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    for stream, output in enumerate(outputs, start=1):
        with open(output, "wb") as file:
            os.dup2(file.fileno(), stream)
    sys.argv = ["-c", *arguments]
    exec(code, {"__name__": "__main__"})


def main() -> None:
    """Answer each request with the exit code of its process."""
    for name in _SLOW_IMPORTS:
        importlib.import_module(name)
    assert "huggingface_hub" not in sys.modules
    answer_requests(_execute)


if __name__ == "__main__":
    main()
