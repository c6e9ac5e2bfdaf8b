import os
import tracemalloc
from pathlib import Path

import pytest

from tacq_vllm.format.json_object import MAX_BYTES, read_json
from tacq_vllm.format.schema import FormatError


def test_what_is_too_large_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text("{}")
    os.truncate(path, MAX_BYTES + 1)

    with pytest.raises(FormatError, match=r"config\.json: larger than 100,000,000"):
        read_json(path)


def test_a_small_file_takes_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"bits": 3}')

    tracemalloc.start()
    try:
        content = read_json(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert content == {"bits": 3}
    assert peak < 1_000_000
