"""The scripts in benchmarks/ begin: what they import is there."""

import runpy
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SCRIPTS = [
    path.name
    for path in sorted(BENCHMARKS.glob("*.py"))
    if "__main__" in path.read_text()
]
OPTIONAL = {"accelerate", "cpuinfo", "httpx", "matplotlib", "psutil"}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_tells_its_options(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    try:
        with pytest.raises(SystemExit) as stopped:
            runpy.run_path(str(BENCHMARKS / name), run_name="__main__")
    except ModuleNotFoundError as error:
        if error.name not in OPTIONAL:
            raise
        pytest.skip(str(error))

    assert stopped.value.code == 0
    assert f"usage: {name}" in capsys.readouterr().out
