"""The command line, in processes that take a server on loopback for the Hub."""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.builders import save_sharded
from tests.hub.processes import Finished, hub_processes
from tests.hub_server import TOKEN, Hub

_COMMANDS = """
import json, sys
import time
# The client's log goes to this process's stderr, not to a command's.
from huggingface_hub.utils import logging
from typer.testing import CliRunner
from tacq_vllm.cli import app
time.sleep = lambda seconds: None  # So the client does before it tries again.
outcomes = []
for arguments in json.loads(sys.argv[1]):
    result = CliRunner().invoke(app, arguments)
    assert result.exception is None or isinstance(result.exception, SystemExit), result
    outcomes.append([result.exit_code, result.stdout, result.stderr])
print(json.dumps(outcomes))
"""

_CLIENT_LOG = re.compile(
    "No files have been modified|thrown while requesting|Retrying in"
)


RunPython = Callable[..., Finished]
Tacq = Callable[..., list[Finished]]


@pytest.fixture(scope="session")
def run_python() -> Iterator[RunPython]:
    """Run code in a process, which must not fail or tell the token."""
    with hub_processes() as processes:

        def run(code: str, environment: dict[str, str], *arguments: str) -> Finished:
            result = processes.run(code, environment, *arguments)
            assert result.exit_code == 0, result.stderr
            assert TOKEN not in result.stdout + result.stderr
            return result

        yield run


@pytest.fixture(scope="session")
def sharded(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint in several shards; tests leave it as it is."""
    return save_sharded(
        tiny_checkpoint, tmp_path_factory.mktemp("sharded") / "tiny-TaCQ-w3"
    )


@pytest.fixture
def copy(sharded: Path, tmp_path: Path) -> Path:
    """A copy of the sharded checkpoint to change."""
    return Path(shutil.copytree(sharded, tmp_path / "tiny-TaCQ-w3"))


@pytest.fixture
def environment(hub: Hub, tmp_path: Path) -> dict[str, str]:
    """Of a client with a token and an empty cache."""
    return os.environ | hub.environment(tmp_path / "hf")


@pytest.fixture
def tacq(run_python: RunPython, environment: dict[str, str]) -> Tacq:
    """Run commands one after the other in a process, which imports the client anew."""

    def tacq(*commands: list[str | Path], **variables: str) -> list[Finished]:
        arguments = [[str(part) for part in command] for command in commands]
        result = run_python(_COMMANDS, environment | variables, json.dumps(arguments))
        log = result.stderr.splitlines()
        assert [line for line in log if not _CLIENT_LOG.search(line)] == []
        return [Finished(*outcome) for outcome in json.loads(result.stdout)]

    return tacq


def assert_one_line(outcome: Finished, reason: str) -> None:
    """Exit code 2, one line that says what is wrong, and nothing else."""
    assert outcome.exit_code == 2
    assert outcome.stdout == ""
    (line,) = outcome.stderr.splitlines()
    assert line.startswith("tacq: ")
    assert reason in line
