"""The wheel: what it holds, and what works where nothing else of ours is."""

import json
import re
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path
from resource import RUSAGE_CHILDREN, getrusage

import pytest

ROOT = Path(__file__).parents[1]
EXTRAS = list(
    tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
)
SELF_CHECK = """
import tacq_vllm, tacq_vllm.config, tacq_vllm.integrations.transformers
from importlib.metadata import entry_points
print(tacq_vllm.__file__)
print(tacq_vllm.config.load_recipe("smollm2/demo").bits)
print(entry_points(group="vllm.general_plugins", name="tacq")["tacq"].load().__module__)
"""


def pip(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pip", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("hatchling", reason="builds the wheel")
    folder = tmp_path_factory.mktemp("wheel")
    options = ["--no-deps", "--no-build-isolation", "--wheel-dir", folder]

    result = pip("wheel", *options, ROOT)

    assert result.returncode == 0, result.stderr
    (path,) = folder.iterdir()
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The commands of a new environment, which borrows all other packages of this."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder)
    python = folder / "bin" / "python"
    result = pip("--python", python, "install", "--no-deps", "--no-index", wheel)
    assert result.returncode == 0, result.stderr
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "borrowed.pth").write_text(sysconfig.get_path("purelib"))
    return folder / "bin"


def test_what_it_holds(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())

    recipes = {
        f"tacq_vllm/quant_config/{path.relative_to(ROOT / 'quant_config').as_posix()}"
        for path in (ROOT / "quant_config").rglob("*.yaml")
    }
    assert len(recipes) > 5
    assert recipes | {"tacq_vllm/format/SPEC.md"} <= names
    sources = (ROOT / "tacq_vllm").rglob("*.py")
    assert {path.relative_to(ROOT).as_posix() for path in sources} <= names
    assert {name.split("/")[0] for name in names} == {
        "tacq_vllm",
        f"{wheel.name.removesuffix('-py3-none-any.whl')}.dist-info",
    }


def test_the_source_archive_holds_what_the_readme_links_to(tmp_path: Path) -> None:
    pytest.importorskip("hatchling", reason="builds the archive")
    command = [
        sys.executable,
        "-m",
        "hatchling",
        "build",
        "-t",
        "sdist",
        "-d",
        tmp_path,
    ]

    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)

    (path,) = tmp_path.iterdir()
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    readme = (ROOT / "README.md").read_text()
    links = re.findall(r"\]\((?!https?:)([^)#]+)", readme)
    files = {link for link in links if (ROOT / link).is_file()}
    assert len(files) > 10
    assert files <= names
    assert {"Makefile", "packaging/vllm-cpu-metadata/pyproject.toml"} <= names


def test_help_is_instant(installed: Path) -> None:
    def seconds() -> float:
        # Of the processor: by the clock it is no less, and more on a busy machine.
        before = getrusage(RUSAGE_CHILDREN)
        subprocess.run([installed / "tacq", "--help"], capture_output=True, check=True)
        after = getrusage(RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    # Other work on the machine takes its caches, and this more time.
    assert any(seconds() < 0.5 for _ in range(20))


def test_it_is_enough(installed: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    def run(*command: str | Path) -> str:
        # Elsewhere than in the checkout, whose package would be found first.
        return subprocess.run(
            command, cwd=tmp_path, env={}, stdout=subprocess.PIPE, text=True, check=True
        ).stdout

    where, bits, plugin = run(installed / "python", "-c", SELF_CHECK).splitlines()
    figures = json.loads(run(installed / "tacq", "inspect", tiny_checkpoint, "--json"))

    assert Path(where).is_relative_to(installed.parent)
    assert bits == "3"
    assert plugin == "tacq_vllm.integrations.vllm"
    assert figures["bits"] == 3


@pytest.mark.network
@pytest.mark.slow
@pytest.mark.parametrize("extra", EXTRAS)
def test_an_extra_resolves(wheel: Path, tmp_path: Path, extra: str) -> None:
    options = ["--dry-run", "--ignore-installed", "--report", tmp_path / "report"]
    if pip("install", *options, "--no-deps", "typer").returncode:
        pytest.skip("no package registry is in reach")

    result = pip("install", *options, f"tacq-vllm[{extra}] @ {wheel.as_uri()}")

    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "report").read_text())
    names = {package["metadata"]["name"] for package in report["install"]}
    assert {"tacq-vllm", "torch", "transformers"} <= names
