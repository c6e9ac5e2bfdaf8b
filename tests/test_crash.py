"""Commands that are killed, interrupted, or run out of disk or memory.

What is not finished never looks whole, what is finished is not lost, and the same
command ends in the same bytes afterwards. How `tacq quantize` goes on is tested in
`quantize/test_resume.py`, how an upload does in `hub/test_push.py`.
"""

import resource
import signal
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import torch

from tacq_vllm.compare.report import TABLE_NAME
from tacq_vllm.compare.rows import RESULTS_NAME, Row, read_row
from tacq_vllm.compare.run import MODELS_FOLDER, ROWS_FOLDER
from tests.builders import quantize_arguments
from tests.compare.test_compare import arguments as comparison
from tests.compare.test_compare import read_results
from tests.conftest import TinyLlama, contents
from tests.convert.sources import save_gptq
from tests.evaluate.conftest import make_data
from tests.processes import run, signal_at

Arguments = Callable[[Path], list[str]]
"""What makes a folder, on the command line."""

INTERRUPTED = "tacq: interrupted; the same command finishes what this one began"


MAKERS = ["quantize", "recover", "import", "export"]


@dataclass(frozen=True)
class Sources:
    """What the makers start from."""

    model: Path
    checkpoint: Path
    gptq: Path
    text: Path

    def arguments(self, maker: str, output: Path) -> list[str]:
        """The command line of a maker."""
        match maker:
            case "quantize":
                return quantize_arguments(self.model, output, self.text)
            case "recover":
                parts = ["recover", self.checkpoint, "--base", self.model]
                parts += ["--calibration", self.text, "--num-samples", "4"]
                parts += ["--seq-len", "16", "--steps", "2"]
            case "import":
                parts = ["import", self.gptq]
            case "export":
                parts = ["export", self.checkpoint, "--to", "dequantized"]
        return [*map(str, parts), "--output", str(output)]


def make_gptq(model: Path, folder: Path) -> Path:
    save_gptq(model, folder, bits=4, group_size=32, sym=True, version=1)
    return folder


@pytest.fixture(scope="module")
def sources(
    tiny_model: Path,
    tiny_checkpoint: Path,
    text_file: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Sources:
    gptq = make_gptq(tiny_model, tmp_path_factory.mktemp("gptq") / "source")
    return Sources(tiny_model, tiny_checkpoint, gptq, text_file)


@pytest.fixture(params=MAKERS)
def arguments(request: pytest.FixtureRequest, sources: Sources) -> Arguments:
    """The command lines of the makers."""
    return partial(sources.arguments, request.param)


@pytest.fixture(scope="module")
def large(
    tiny_llama: TinyLlama, text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Sources:
    """Linears of 4 MB in float32, whose second moments take up to 64 MB."""
    folder = tmp_path_factory.mktemp("large")
    sizes = {"hidden_size": 256, "intermediate_size": 4096, "num_hidden_layers": 1}
    model = tiny_llama(torch.bfloat16, **sizes)
    checkpoint = folder / "checkpoint"
    outcome = run(quantize_arguments(model, checkpoint, text_file, method="rtn"))
    assert outcome.exit_code == 0, outcome.words
    return Sources(model, checkpoint, make_gptq(model, folder / "gptq"), text_file)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data to compare on."""
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def compared(
    tiny_model: Path, root: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A comparison that nothing has disturbed."""
    folder = tmp_path_factory.mktemp("compared") / "out"
    outcome = run(comparison(tiny_model, folder, root))
    assert outcome.exit_code == 0, outcome.words
    return folder


def looks_whole(folder: Path) -> bool:
    """Whether somebody might take a folder for a model."""
    return (folder / "config.json").exists()


def rows(folder: Path) -> dict[str, Row]:
    """The rows of a comparison by their names, without times and memory."""
    found = {}
    for path in (folder / ROWS_FOLDER).glob("*.json"):
        row = read_row(path)
        assert row is not None
        unmeasured = {"seconds": {}, "machine": {}, "peak_bytes": None}
        found[path.name] = row.model_copy(update=unmeasured)
    return found


def assert_no_part(folder: Path, compared: Path) -> None:
    """What is there of a comparison is what an undisturbed one has there."""
    whole = rows(compared)
    assert all(whole[name] == row for name, row in rows(folder).items())
    if (folder / RESULTS_NAME).exists():
        assert len(read_results(folder)) == len(whole)
    if (folder / TABLE_NAME).exists():
        table = (folder / TABLE_NAME).read_bytes()
        assert table == (compared / TABLE_NAME).read_bytes()


def assert_goes_on(command: list[str], folder: Path, compared: Path) -> None:
    """The same command finishes a comparison, without anything left over."""
    outcome = run(command)
    assert outcome.exit_code == 0, outcome.words
    assert rows(folder) == rows(compared)
    assert_no_part(folder, compared)
    assert not [path for path in folder.rglob("*") if ".partial" in path.name]
    assert not list((folder / "work" / MODELS_FOLDER).iterdir())


def test_killed_at_any_file(arguments: Arguments, tmp_path: Path) -> None:
    whole, made = tmp_path / "whole", tmp_path / "made"
    assert run(arguments(whole)).exit_code == 0
    out = made / "out"
    kills, count = 0, 1
    # What is finished is found again, so each run comes farther.
    while (outcome := run(arguments(out), signal_at(count, signal.SIGKILL))).exit_code:
        kills, count = kills + 1, count + 1 + count // 3
        assert outcome.exit_code == -signal.SIGKILL, outcome.words
        assert not out.exists()
        for left in made.glob(".*.partial") if made.exists() else ():
            assert not looks_whole(left) or contents(left) == contents(whole)

    assert kills > 3
    assert contents(out) == contents(whole)
    assert [path.name for path in made.iterdir()] == ["out"]


def test_a_comparison_killed_at_any_file(
    tiny_model: Path, root: Path, compared: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = comparison(tiny_model, out, root)
    kills, count = 0, 2
    known: set[str] = set()
    while (outcome := run(command, signal_at(count, signal.SIGKILL))).exit_code:
        kills, count = kills + 1, 2 * count
        assert outcome.exit_code == -signal.SIGKILL, outcome.words
        assert_no_part(out, compared)
        assert known <= rows(out).keys()
        known = set(rows(out))

    assert kills > 3
    assert known
    assert_goes_on(command, out, compared)


def test_ctrl_c(arguments: Arguments, tmp_path: Path) -> None:
    out = tmp_path / "made" / "out"

    outcome = run(arguments(out), signal_at(4, signal.SIGINT))

    assert outcome.exit_code == 130
    assert outcome.last_line == INTERRUPTED
    assert "Traceback" not in outcome.words
    assert not out.exists()
    assert run(arguments(out)).exit_code == 0


def test_a_comparison_and_ctrl_c(
    tiny_model: Path, root: Path, compared: Path, tmp_path: Path
) -> None:
    command = comparison(tiny_model, tmp_path / "out", root)

    outcome = run(command, signal_at(25, signal.SIGINT))

    assert outcome.exit_code == 130
    assert outcome.last_line == INTERRUPTED
    assert "Traceback" not in outcome.words
    assert_no_part(tmp_path / "out", compared)
    assert_goes_on(command, tmp_path / "out", compared)


def make_room(folder: Path) -> None:
    subprocess.run(["mount", "-o", "remount,size=64m", folder], check=True)


@pytest.mark.parametrize("pages", [1, 8, 20])
def test_a_full_disk(
    arguments: Arguments, mount: Callable[..., Path], pages: int
) -> None:
    folder = mount(f"size={pages * 4096}")

    outcome = run(arguments(folder / "out"))

    assert outcome.exit_code == 2, outcome.words
    assert "No space left on device" in outcome.last_line
    assert "Traceback" not in outcome.words
    assert not (folder / "out").exists()
    assert not any(map(looks_whole, folder.iterdir()))


def test_after_a_full_disk_the_same_command_goes_on(
    arguments: Arguments, mount: Callable[..., Path], tmp_path: Path
) -> None:
    folder = mount(f"size={20 * 4096}")
    assert run(arguments(folder / "out")).exit_code == 2

    make_room(folder)

    assert run(arguments(folder / "out")).exit_code == 0
    assert run(arguments(tmp_path / "whole")).exit_code == 0
    assert contents(folder / "out") == contents(tmp_path / "whole")


def test_a_comparison_on_a_full_disk(
    tiny_model: Path, root: Path, compared: Path, mount: Callable[..., Path]
) -> None:
    folder = mount(f"size={40 * 4096}")
    command = comparison(tiny_model, folder / "out", root)

    outcome = run(command)

    assert outcome.exit_code == 2, outcome.words
    assert "No space left on device" in outcome.last_line
    assert "Traceback" not in outcome.words
    assert_no_part(folder / "out", compared)
    make_room(folder)
    assert_goes_on(command, folder / "out", compared)


def test_a_folder_that_is_read_only(
    arguments: Arguments, mount: Callable[..., Path]
) -> None:
    folder = mount("ro")

    outcome = run(arguments(folder / "out"))

    assert outcome.exit_code == 2, outcome.words
    assert "Read-only file system" in outcome.last_line
    assert "Traceback" not in outcome.words


def test_a_comparison_in_a_folder_that_is_read_only(
    tiny_model: Path, root: Path, mount: Callable[..., Path]
) -> None:
    outcome = run(comparison(tiny_model, mount("ro") / "out", root))

    # At once: nothing was measured before.
    assert outcome.exit_code == 2, outcome.words
    (line,) = outcome.words.splitlines()
    assert "out: nothing can be written there; choose another --output" in line


def limit_memory(megabytes: int) -> None:
    """Allow this process so much more than it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + (megabytes << 20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


@pytest.mark.parametrize(
    ("maker", "megabytes"),
    [*product(MAKERS, [2, 12]), ("quantize", 64), ("recover", 64)],
)
def test_no_memory(large: Sources, tmp_path: Path, maker: str, megabytes: int) -> None:
    """Where safetensors maps a file, where PyTorch takes a tensor."""
    made = tmp_path / "made"

    outcome = run(
        large.arguments(maker, made / "out"), partial(limit_memory, megabytes)
    )

    assert outcome.exit_code == 2, outcome.words
    assert outcome.last_line.startswith("tacq: out of memory; ")
    assert "Traceback" not in outcome.words
    assert not (made / "out").exists()
    assert not list(made.glob(".*.partial"))
