"""Finding the threads that PyTorch has."""

from unittest.mock import Mock

import pytest

from tests.kernels.cpu import OBSTACLE

if OBSTACLE is not None:
    pytest.skip(OBSTACLE, allow_module_level=True)

from tacq_vllm.kernels import openmp

MAPS = """\
7f21c0000000-7f21c0021000 rw-p 00000000 00:00 0
7f21d4a00000-7f21d4a40000 r-xp 00000000 08:01 42    /opt/a b/lib/libgomp-1.so.1
7ffd8c5e2000-7ffd8c603000 rw-p 00000000 00:00 0     [stack]
"""


def test_a_runtime_in_a_folder_with_a_space(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []

    def load(path: str | None) -> object:
        opened.append(path)
        return object() if path is None else Mock()

    monkeypatch.setattr(openmp.Path, "read_text", lambda path: MAPS)
    monkeypatch.setattr(openmp.ctypes, "CDLL", load)

    found = openmp.find_openmp.__wrapped__()

    assert found is not None
    assert opened == [None, "/opt/a b/lib/libgomp-1.so.1"]
