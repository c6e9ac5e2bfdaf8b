"""No kernel for the CPU touches a byte outside its tensors."""

import faulthandler
import os
import signal
import subprocess
import sys

import pytest
import torch

from tests.kernels.cpu import OBSTACLE
from tests.kernels.guard_pages import TOKENS, guarded, linears

if OBSTACLE is not None:
    pytest.skip(OBSTACLE, allow_module_level=True)

from tacq_vllm.kernels.cpu_amx import has_amx


@pytest.mark.parametrize("index", [-1, 8])
def test_the_guards_hold(index: int) -> None:
    """A read of one word too many is a fault."""
    tensor = guarded((8,), torch.int32, before=index < 0)
    child = os.fork()
    if child == 0:
        faulthandler.disable()
        torch.as_strided(tensor, (1,), (1,), tensor.storage_offset() + index).item()
        os._exit(0)

    _, status = os.waitpid(child, 0)

    assert os.waitstatus_to_exitcode(status) == -signal.SIGSEGV


@pytest.mark.parametrize("way", ["exact", "int8", *["amx"] * has_amx()])
def test_nothing_outside_is_touched(way: str) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "tests.kernels.guard_pages", way],
        env=os.environ | {"OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )

    assert result.returncode == 0, result.stdout[-200:] + result.stderr[-2000:]
    count = 2 * len(list(linears(way))) * len(TOKENS)
    assert len(result.stdout.splitlines()) == count
