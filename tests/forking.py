"""Programs that import what takes long once, and fork a process for each request.

A request is a line of JSON, its answer the exit code of its process.
"""

import json
import multiprocessing
import subprocess
import sys
from collections.abc import Callable
from typing import Any, TextIO


def ask(program: "subprocess.Popen[str]", **request: Any) -> int:
    """Hand a request to a program; gives the exit code of the process it forked."""
    assert program.stdin is not None
    assert program.stdout is not None
    program.stdin.write(json.dumps(request) + "\n")
    program.stdin.flush()
    return int(program.stdout.readline())


def answer_requests(work: Callable[..., None], replies: TextIO = sys.stdout) -> None:
    """In a program: call `work` with each request, in a process of its own."""
    fork = multiprocessing.get_context("fork")
    for line in sys.stdin:
        process = fork.Process(target=work, kwargs=json.loads(line))
        process.start()
        process.join()
        print(process.exitcode, file=replies, flush=True)
