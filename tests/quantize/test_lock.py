import errno
import logging
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tacq_vllm.quantize import lock
from tacq_vllm.quantize.errors import QuantizeError
from tacq_vllm.quantize.lock import locked_folder

HOLDING = """
import sys
from pathlib import Path
from tacq_vllm.quantize.lock import locked_folder
with locked_folder(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def enter(folder: Path) -> None:
    with locked_folder(folder):
        pass


def test_a_folder_is_one_process_s_at_a_time(tmp_path: Path) -> None:
    """Until that ends, even if it is killed."""
    folder = tmp_path / "deep" / "work"
    with subprocess.Popen(
        [sys.executable, "-c", HOLDING, folder],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(QuantizeError, match="work: another process is at work"):
            enter(folder)
        process.send_signal(signal.SIGKILL)

    enter(folder)
    assert not list(folder.iterdir())


def test_a_folder_is_free_after_a_failure(tmp_path: Path) -> None:
    def fail() -> None:
        with locked_folder(tmp_path):
            raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011
        fail()

    enter(tmp_path)


def test_a_file_system_without_locks_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(handle: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", refuse)

    with caplog.at_level(logging.WARNING):
        enter(tmp_path)

    (record,) = caplog.records
    assert "cannot be locked (No locks available)" in record.getMessage()
