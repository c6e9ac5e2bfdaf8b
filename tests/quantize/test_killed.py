"""A command that is killed over and over."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tacq_vllm.cli import app
from tacq_vllm.format.validation import find_faults
from tests.builders import quantize_arguments
from tests.conftest import contents


@pytest.mark.slow
def test_a_killed_command_goes_on(
    tiny_model: Path, task_file: Path, tmp_path: Path
) -> None:
    """SIGKILL at random moments, without a work folder of the user's."""
    choose = random.Random(5)

    def arguments(output: Path) -> list[str]:
        return quantize_arguments(tiny_model, output, task_file, num_samples=40)

    command = arguments(tmp_path / "made" / "out")
    for _ in range(6):
        process = subprocess.Popen(
            [Path(sys.executable).parent / "tacq", *command],
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        assert process.stderr is not None
        for _ in range(choose.randrange(2, 8)):
            assert process.stderr.readline()
        time.sleep(choose.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        process.stderr.close()
        left = {path.name for path in (tmp_path / "made").iterdir()}
        assert ".out.work" in left
        assert left <= {".out.work", ".out.partial"}
        assert find_faults(tmp_path / "made" / ".out.partial")

    result = CliRunner().invoke(app, command)

    assert result.exit_code == 0, result.output
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["out"]
    assert "taken from the work folder" in result.stderr
    whole = CliRunner().invoke(app, arguments(tmp_path / "whole"))
    assert whole.exit_code == 0
    assert contents(tmp_path / "made" / "out") == contents(tmp_path / "whole")
