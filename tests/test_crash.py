"""Commands that are killed, interrupted, or run out of disk or memory.

What is not finished never looks whole, what is finished is not lost, and the same
command ends in the same bytes afterwards. How `tacq quantize` goes on is tested in
`quantize/test_resume.py`, how an upload does in `hub/test_push.py`.
"""

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from tacq_vllm.cli import app
from tests.builders import quantize_arguments
from tests.conftest import TinyLlama
from tests.convert.sources import save_gptq

Arguments = Callable[[Path], list[str]]
"""What makes a folder, on the command line."""

MIB = 1 << 20


@pytest.fixture(scope="module")
def gptq(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gptq") / "source"
    save_gptq(tiny_model, folder, bits=4, group_size=32, sym=True, version=1)
    return folder


@pytest.fixture(params=["quantize", "recover", "import", "export"])
def arguments(
    request: pytest.FixtureRequest,
    tiny_model: Path,
    tiny_checkpoint: Path,
    text_file: Path,
    gptq: Path,
) -> Arguments:
    """The command lines of the makers."""
    commands: dict[str, Arguments] = {
        "quantize": lambda out: quantize_arguments(tiny_model, out, text_file),
        "recover": lambda out: [
            *("recover", str(tiny_checkpoint), "--base", str(tiny_model)),
            *("--calibration", str(text_file), "--num-samples", "4"),
            *("--seq-len", "16", "--steps", "2", "--output", str(out)),
        ],
        "import": lambda out: ["import", str(gptq), "--output", str(out)],
        "export": lambda out: [
            *("export", str(tiny_checkpoint), "--to", "dequantized"),
            *("--output", str(out)),
        ],
    }
    return commands[request.param]


def run(
    arguments: list[str], before: Callable[[], None] = lambda: None
) -> tuple[int, str]:
    """Run a command in a copy of this process; its exit code and last words.

    A copy has everything imported: commands take no longer than their work.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(writer, 2)
        code = 99
        try:
            sys.stdout = sys.stderr = os.fdopen(2, "w")
            # Jobs in the background of a shell are told to ignore it.
            signal.signal(signal.SIGINT, signal.default_int_handler)
            before()
            app(arguments, standalone_mode=True)
        except SystemExit as stop:
            code = int(stop.code or 0)
        except BaseException as error:
            print(f"traceback: {error!r}", file=sys.stderr)
        finally:
            with suppress(OSError):
                sys.stderr.flush()
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader) as file:
        words = file.read()
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), words


def contents(folder: Path) -> dict[str, bytes]:
    """Bytes of the files, but for those that tell the times of a run."""
    return {
        path.name: path.read_bytes()
        for path in folder.iterdir()
        if path.name not in ("timings.json", "loss.jsonl")
    }


def looks_whole(folder: Path) -> bool:
    """Whether somebody might take a folder for a model."""
    return (folder / "config.json").exists()


def stop_at(count: int, stop: Callable[[], None]) -> Callable[[], None]:
    """Stop at the n-th time that something is made or renamed."""
    seen = 0

    def watch(event: str, values: tuple[object, ...]) -> None:
        nonlocal seen
        makes = event == "open" and isinstance(values[1], str) and "w" in values[1]
        if makes or event in ("os.mkdir", "os.rename", "os.chmod"):
            seen += 1
            if seen == count:
                stop()

    return lambda: sys.addaudithook(watch)


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_killed_at_any_file(arguments: Arguments, tmp_path: Path) -> None:
    whole, made = tmp_path / "whole", tmp_path / "made"
    assert run(arguments(whole))[0] == 0
    out = made / "out"
    kills, count, code = 0, 1, -1
    # What is finished is found again, so each run comes farther.
    while code != 0:
        code, words = run(arguments(out), stop_at(count, kill))
        if code == 0:
            break
        kills, count = kills + 1, count + 1 + count // 3
        assert code == -signal.SIGKILL, words
        assert not out.exists()
        for left in made.glob(".*.partial") if made.exists() else ():
            assert not looks_whole(left) or contents(left) == contents(whole)

    assert kills > 3
    assert code == 0, words
    assert contents(out) == contents(whole)
    assert [path.name for path in made.iterdir()] == ["out"]


def test_ctrl_c(arguments: Arguments, tmp_path: Path) -> None:
    out = tmp_path / "made" / "out"

    code, words = run(
        arguments(out),
        stop_at(4, lambda: os.kill(os.getpid(), signal.SIGINT)),
    )

    assert code == 130
    assert words.splitlines()[-1].startswith("tacq: interrupted; the same command")
    assert "Traceback" not in words
    assert not out.exists()
    assert run(arguments(out))[0] == 0


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Mount a file system in memory; skipped where that is not allowed."""
    mounted: list[Path] = []

    def make(*options: str) -> Path:
        folder = tmp_path / "mounted"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs"]
        result = subprocess.run(
            [*command, folder], capture_output=True, text=True, check=False
        )
        if result.returncode:
            pytest.skip(f"cannot mount: {result.stderr.strip()}")
        mounted.append(folder)
        return folder

    yield make
    for folder in mounted:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("pages", [1, 8, 20])
def test_a_full_disk(
    arguments: Arguments, mount: Callable[..., Path], pages: int
) -> None:
    folder = mount(f"size={pages * 4096}")

    code, words = run(arguments(folder / "out"))

    assert code == 2, words
    last = words.splitlines()[-1]
    assert "No space left on device" in last
    assert "Traceback" not in words
    assert not (folder / "out").exists()
    assert not any(map(looks_whole, folder.iterdir()))


def test_after_a_full_disk_the_same_command_goes_on(
    arguments: Arguments, mount: Callable[..., Path], tmp_path: Path
) -> None:
    folder = mount(f"size={20 * 4096}")
    assert run(arguments(folder / "out"))[0] == 2

    subprocess.run(["mount", "-o", "remount,size=64m", folder], check=True)

    assert run(arguments(folder / "out"))[0] == 0
    assert run(arguments(tmp_path / "whole"))[0] == 0
    assert contents(folder / "out") == contents(tmp_path / "whole")


def test_a_folder_that_is_read_only(
    arguments: Arguments, mount: Callable[..., Path]
) -> None:
    folder = mount("ro")

    code, words = run(arguments(folder / "out"))

    assert code == 2, words
    assert "Read-only file system" in words.splitlines()[-1]
    assert "Traceback" not in words


def limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + 64 * MIB
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def test_no_memory(tiny_llama: TinyLlama, text_file: Path, tmp_path: Path) -> None:
    """The second moments of 4,096 inputs take twice what is left."""
    sizes = {"intermediate_size": 4096, "num_hidden_layers": 1}
    model = tiny_llama(torch.bfloat16, **sizes)
    command = quantize_arguments(model, tmp_path / "made" / "out", text_file)

    code, words = run(command, limit_memory)

    assert code == 2, words
    assert words.splitlines()[-1].startswith("tacq: out of memory; ")
    assert "Traceback" not in words
    assert not (tmp_path / "made" / "out").exists()
