"""Changed checkpoints are refused, or read as SPEC.md says."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzzing.judge import judge
from tests.fuzzing.mutations import (
    CHANGES,
    MAX_STEPS,
    Files,
    make_files,
    mutate,
)

ROOT = Path(__file__).parents[2]
SECONDS = 25
"""With imports, about half a minute."""

steps = st.tuples(
    st.integers(0, 2),
    st.integers(0, len(CHANGES) - 1),
    *(st.integers(0, 2**16 - 1),) * 3,
)


def encode(program: list[tuple[int, ...]]) -> bytes:
    return b"".join(
        bytes([part, kind])
        + b"".join(number.to_bytes(2, "little") for number in numbers)
        for part, kind, *numbers in program
    )


@pytest.fixture(scope="module", params=["planes", "clusters"])
def good(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Files]:
    folder = tmp_path_factory.mktemp("fuzzed")
    return folder, make_files(folder, request.param)


def test_the_good_one_is_read(good: tuple[Path, Files]) -> None:
    folder, files = good
    mutate(files, b"").write(folder)

    assert judge(folder)


@settings(max_examples=200)
@given(program=st.lists(steps, min_size=1, max_size=MAX_STEPS))
def test_changed_checkpoints(
    good: tuple[Path, Files], program: list[tuple[int, ...]]
) -> None:
    folder, files = good
    mutate(files, encode(program)).write(folder)

    judge(folder)


def test_a_change_of_codes_is_read_by_both(good: tuple[Path, Files]) -> None:
    """Fuzzing has something to compare: not all that is changed is refused."""
    folder, files = good
    accepted = 0
    for place in range(0, len(files.data), len(files.data) // 30):
        mutate(files, encode([(2, 0, place, 1, 0)])).write(folder)
        accepted += judge(folder)

    assert accepted > 10


@pytest.mark.slow
def test_half_a_minute_of_atheris(tmp_path: Path) -> None:
    pytest.importorskip("atheris", reason="atheris is not installed")

    result = subprocess.run(
        [
            *(sys.executable, "-m", "tests.fuzzing.run"),
            *(f"-max_total_time={SECONDS}", f"-artifact_prefix={tmp_path}/"),
        ],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )

    assert result.returncode == 0, result.stderr[-4000:]
    assert list(tmp_path.iterdir()) == []
    (done,) = re.findall(r"^Done (\d+) runs", result.stderr, re.MULTILINE)
    assert int(done) > 20
