"""Whether a model's query gives what the right one gives."""

import json
import select
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Self

_WORKER = "tacq_vllm.evaluate.sql.worker"
_GRACE_SECONDS = 2.0
"""For a worker to stop a query by itself, and to compare rows."""


class Judge:
    """Runs queries in a process of its own, which is killed if it does not answer.

    Args:
        seconds: of each query, at most.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop()

    def verdict(self, database: Path, gold: str, answer: str) -> str:
        """`right`, `wrong`, `fails: WHY`, or `gold: WHY` where the right one fails.

        Args:
            database: a SQLite file.
            gold: the right query.
            answer: the query to judge.
        """
        request = {
            "database": str(database),
            "gold": gold,
            "answer": answer,
            "seconds": self._seconds,
        }
        process = self._running()
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
        patience = 2 * self._seconds + _GRACE_SECONDS
        if not select.select([process.stdout], [], [], patience)[0]:
            self._stop()
            return f"fails: no answer in {patience:g} s"
        line = process.stdout.readline()
        if not line:
            self._stop()
            return "fails: the process that ran it died"
        return str(json.loads(line))

    def _running(self) -> "subprocess.Popen[str]":
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", _WORKER],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
        return self._process

    def _stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None
