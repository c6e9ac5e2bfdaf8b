"""Several processes, started by torchrun, on this machine's loopback."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from typer.testing import CliRunner

from tacq_vllm.cli import app
from tacq_vllm.config import Method, Recipe
from tacq_vllm.format.checkpoint import CheckpointReader, read_schema
from tacq_vllm.format.linear import PackedLinear
from tacq_vllm.format.stored import unpack_outliers
from tacq_vllm.format.validation import find_faults, load_linear
from tacq_vllm.kernels.reference import dequantize
from tacq_vllm.quantize.methods.table import METHODS
from tacq_vllm.quantize.model import BaseModel
from tacq_vllm.quantize.passes import Passes
from tacq_vllm.quantize.progress import Progress
from tacq_vllm.quantize.workdir import WorkDir
from tacq_vllm.quantize.world import World, open_world
from tests.builders import quantize_arguments
from tests.conftest import quick


def torchrun(
    processes: int, code: str, *arguments: str | Path
) -> "subprocess.CompletedProcess[str]":
    """Run a program in several processes."""
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        + [f"--nproc-per-node={processes}", "--no-python", sys.executable, "-c", code]
        + [str(argument) for argument in arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )


def test_one_process_works_alone() -> None:
    world, tensor = World(), torch.arange(6.0).view(3, 2)

    assert world.leads
    assert world.share("abc") == ["a", "b", "c"]
    assert world.rows(3) == slice(0, 3)
    assert world.gather_rows(tensor, 3) is tensor
    world.add_up(tensor)
    world.wait()
    with world.leader_first():
        assert torch.equal(tensor, torch.arange(6.0).view(3, 2))


@given(size=st.integers(1, 5), count=st.integers(0, 20), multiple=st.integers(1, 6))
def test_every_item_and_every_row_is_somebodys(
    size: int, count: int, multiple: int
) -> None:
    worlds = [World(rank, size) for rank in range(size)]

    shares = [world.share(range(count)) for world in worlds]
    rows = [list(range(count))[world.rows(count, multiple)] for world in worlds]

    assert sorted(item for share in shares for item in share) == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert [row for part in rows for row in part] == list(range(count))
    assert all(part[0] % multiple == 0 for part in rows if part)


def test_without_torchrun_there_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)

    with open_world(torch.device("cpu")) as (world, device):
        assert world == World()
        assert device == torch.device("cpu")
    assert not torch.distributed.is_initialized()


TOGETHER = """
import sys
from pathlib import Path
import torch
from tacq_vllm.quantize.world import open_world

mark = Path(sys.argv[1]) / "mark"
with open_world(torch.device("cpu")) as (world, device):
    assert world.size == 3 and world.leads == (world.rank == 0)
    # The leader may work for hours while the others wait.
    group = torch.distributed.group.WORLD._get_backend(device)
    assert group.options._timeout.days >= 1
    total = torch.full((2,), float(world.rank + 1))
    world.add_up(total)
    assert total.tolist() == [6.0, 6.0]
    # More rows than processes, and fewer in some; more processes than rows.
    for count, dtype in ((7, torch.float32), (4, torch.uint8), (2, torch.bfloat16)):
        for multiple in (1, 4):
            whole = torch.arange(count * 5).view(count, 5).to(dtype)
            part = whole[world.rows(count, multiple)]
            gathered = world.gather_rows(part, count, multiple)
            assert gathered.dtype == dtype and torch.equal(gathered, whole)
    with world.leader_first():
        assert mark.exists() != world.leads
        mark.touch()
    world.wait()
assert not torch.distributed.is_initialized()
"""


def test_processes_work_together(tmp_path: Path) -> None:
    result = torchrun(3, TOGETHER, tmp_path)

    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_one_that_follows_makes_no_folder_of_a_phase(
    tiny_base: BaseModel,
    tiny_recipe: Recipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: Method,
) -> None:
    """Neither of a pass nor of the text: it waits for the leader's."""

    def stop(world: World) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(World, "wait", stop)
    recipe, workdir = quick(tiny_recipe, method=method), WorkDir(tmp_path / "work")
    passes = Passes(tiny_base, recipe, workdir, Progress(), World(1, 2), None)

    with pytest.raises(KeyboardInterrupt):
        METHODS[method](passes)

    assert not workdir.folder.exists()


RECORDED_RUN = """
import os, sys
from tacq_vllm.cli import app

log = open(f"{sys.argv[1]}/renamed-{os.environ['RANK']}.txt", "w", buffering=1)

def record(event, arguments):
    if event == "os.rename" and str(arguments[1]).endswith(".safetensors"):
        print(os.path.relpath(arguments[1], sys.argv[1]), file=log)

sys.addaudithook(record)
app(sys.argv[2:])
"""


@dataclass(frozen=True)
class Runs:
    """The same command in one process and in two."""

    folder: Path
    one: Path
    two: Path
    printed: str

    def renamed(self, rank: int) -> list[Path]:
        """The tensor files that a process has finished."""
        lines = (self.folder / f"renamed-{rank}.txt").read_text().splitlines()
        return [Path(line) for line in lines]

    def linears(self) -> Iterator[tuple[str, PackedLinear, PackedLinear]]:
        schema = read_schema(self.one)
        with CheckpointReader(self.one) as one, CheckpointReader(self.two) as two:
            for name in schema.linears:
                first = load_linear(one, schema, name)
                yield name, first, load_linear(two, read_schema(self.two), name)


@pytest.fixture(scope="module")
def runs(
    tiny_model: Path, task_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Runs:
    folder = tmp_path_factory.mktemp("world")
    recipe = folder / "recipe.yaml"
    # Two inputs that are equally strong, but for rounding, would change places.
    recipe.write_text("gptq: {activation_order: false}\n")

    def arguments(name: str) -> list[str]:
        return quantize_arguments(
            tiny_model,
            folder / name,
            task_file,
            recipe=recipe,
            work_dir=folder / f"work-{name}",
            num_samples=20,
            outlier_ratio=0.05,
        )

    one = CliRunner().invoke(app, arguments("one"))
    assert one.exit_code == 0, one.output
    two = torchrun(2, RECORDED_RUN, folder, *arguments("two"))
    assert two.returncode == 0, two.stderr
    return Runs(folder, folder / "one", folder / "two", two.stdout)


def positions(linear: PackedLinear) -> set[tuple[int, int]]:
    outliers = unpack_outliers(linear)
    return set(zip(outliers.rows.tolist(), outliers.columns.tolist(), strict=True))


def test_two_processes_keep_the_same_weights(runs: Runs) -> None:
    kept = shared = 0
    for _, first, second in runs.linears():
        kept += len(positions(first))
        shared += len(positions(first) & positions(second))

    assert kept == int(0.05 * 73_728)
    assert read_schema(runs.two).num_weights == 73_728
    assert shared >= 0.999 * kept


def test_two_processes_give_nearly_the_same_weights(runs: Runs) -> None:
    """Sums in another order: at most one weight of a hundred gets another code."""

    def compare(W: Tensor, other: Tensor) -> tuple[float, float]:
        changed = float((other != W).float().mean())
        return changed, float((W - other).norm() / W.norm())

    for name, first, second in runs.linears():
        changed, distance = compare(dequantize(first), dequantize(second))
        assert changed < 0.01, name
        assert distance < 0.02, name


def test_two_processes_make_a_whole_checkpoint(runs: Runs) -> None:
    assert find_faults(runs.two) == []
    assert {path.name for path in runs.two.iterdir()} == {
        path.name for path in runs.one.iterdir()
    }
    reports = [
        [json.loads(line) for line in (folder / "report.jsonl").open()]
        for folder in (runs.one, runs.two)
    ]
    for first, second in zip(*reports, strict=True):
        assert first["name"] == second["name"]
        assert second["error"] == pytest.approx(first["error"], rel=0.01)


def test_one_of_two_processes_speaks(runs: Runs) -> None:
    lines = runs.printed.splitlines()
    # PyTorch 2.9 has Gloo tell of its peers.
    (line,) = (line for line in lines if not line.startswith("[Gloo]"))
    assert line.startswith(f"{runs.two}: ")


def test_processes_leave_each_others_files_alone(runs: Runs) -> None:
    leader, follower = (runs.renamed(rank) for rank in (0, 1))

    # Each has made files of its own, and none of the other's.
    assert follower
    assert not set(leader) & set(follower)
    # What was found together is the leader's to write.
    kinds = {path.name.split("-")[0] for path in follower}
    assert kinds == {"hidden", "gradient"}
    results = {path.name.split("-")[0] for path in leader} - kinds
    assert results == {
        "calibration.safetensors",
        "sums",
        "passed",
        "head.safetensors",
        "block",
        "model.safetensors",
    }


def test_nothing_of_the_passes_stays_in_the_work_folder(runs: Runs) -> None:
    left, alone = (
        sorted(path.name for path in (runs.folder / f"work-{name}").rglob("*.s*"))
        for name in ("two", "one")
    )
    assert left == alone


def test_more_processes_than_samples_are_refused(
    tiny_model: Path, text_file: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    arguments = quantize_arguments(tiny_model, output, text_file, num_samples=1)

    result = torchrun(2, RECORDED_RUN, tmp_path, *arguments)

    assert result.returncode != 0
    assert "tacq: 2 processes share 1 calibration samples: start" in result.stderr
    assert not output.exists()
