import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from tacq_vllm.format import staging
from tacq_vllm.quantize.errors import QuantizeError
from tacq_vllm.quantize.workdir import (
    PhaseFolder,
    WorkDir,
    check_output,
    fingerprint,
    open_workdir,
)
from tacq_vllm.quantize.world import World
from tests.builders import truncate


@pytest.fixture
def work(tmp_path: Path) -> WorkDir:
    return WorkDir(tmp_path / "deep" / "work")


def test_what_was_saved_is_read_back(phase_folder: PhaseFolder) -> None:
    tensors = {"a": torch.arange(6).view(2, 3).T, "b": torch.ones(3)}

    phase_folder.save("sums", tensors, {"seconds": "1.5"})

    assert "sums" in phase_folder
    loaded = phase_folder.load("sums")
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[key], tensors[key]) for key in tensors)
    assert torch.equal(phase_folder.load_tensor("sums", "b"), torch.ones(3))
    assert phase_folder.notes("sums") == {"seconds": "1.5"}


def test_a_file_without_tensors_is_a_mark(phase_folder: PhaseFolder) -> None:
    phase_folder.save("passed", {})

    assert "passed" in phase_folder
    assert not phase_folder.is_empty


def test_what_is_removed_is_gone(phase_folder: PhaseFolder) -> None:
    phase_folder.save("sums", {"a": torch.ones(1)})

    phase_folder.remove("sums")
    phase_folder.remove("sums")

    assert "sums" not in phase_folder
    assert phase_folder.is_empty


def test_a_file_counts_only_when_it_is_whole(
    phase_folder: PhaseFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(source: Path, target: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(staging.os, "replace", stop)
        with pytest.raises(KeyboardInterrupt):
            phase_folder.save("sums", {"a": torch.ones(1)})

    assert any(phase_folder.folder.glob("sums*"))
    assert "sums" not in phase_folder
    assert phase_folder.is_empty
    with pytest.raises(QuantizeError, match=r"sums\.safetensors"):
        phase_folder.load_tensor("sums", "a")
    phase_folder.save("sums", {"a": torch.zeros(1)})
    assert torch.equal(phase_folder.load("sums")["a"], torch.zeros(1))


def test_a_sweep_takes_what_is_not_whole_too(phase_folder: PhaseFolder) -> None:
    for name in ("hidden-0000", "sums-0000"):
        phase_folder.save(name, {"a": torch.ones(1)})
    (phase_folder.folder / "hidden-0001.safetensors.partial").touch()

    phase_folder.sweep("hidden")

    left = {path.name for path in phase_folder.folder.iterdir()}
    assert left == {"depends.json", "sums-0000.safetensors"}


def test_a_failed_save_leaves_what_was_there(phase_folder: PhaseFolder) -> None:
    phase_folder.save("sums", {"a": torch.ones(1)})

    with pytest.raises((TypeError, SafetensorError)):
        phase_folder.save("sums", {"a": torch.zeros(1)}, {"seconds": 3})

    assert torch.equal(phase_folder.load("sums")["a"], torch.ones(1))


def test_a_phase_is_found_by_what_it_depends_on(work: WorkDir) -> None:
    depends = {"bits": 3, "gptq": {"steps": 2, "order": True}}
    reordered = {"gptq": {"order": True, "steps": 2}, "bits": 3}
    work.phase("gptq", depends).save("block", {"a": torch.ones(1)})

    assert "block" in work.phase("gptq", reordered)
    assert work.phase("gptq", depends | {"bits": 2}).is_empty
    assert work.phase("gradients", depends).is_empty
    assert WorkDir(work.folder).phase("gptq", depends).is_empty is False


def test_a_phase_that_is_there_is_only_read(work: WorkDir) -> None:
    """By several processes, each of which would stage the same file."""
    path = work.phase("gptq", {"bits": 3}).folder / "depends.json"
    before = path.stat().st_ino

    work.phase("gptq", {"bits": 3})

    assert path.stat().st_ino == before


def test_fingerprints_do_not_depend_on_the_order_of_keys() -> None:
    first = fingerprint({"a": 1, "b": {"c": [1, 2], "d": None}})

    assert first == fingerprint({"b": {"d": None, "c": [1, 2]}, "a": 1})
    others = [
        {"a": 1, "b": {"c": [2, 1], "d": None}},
        {"a": "1", "b": {"c": [1, 2], "d": None}},
        {"a": 1, "b": {"c": [1, 2]}},
        {},
    ]
    assert len({first, *map(fingerprint, others)}) == 5


def test_differences_are_told(work: WorkDir) -> None:
    depends = {"bits": 3, "damp": 0.5, "gptq": {"steps": 2}, "tokens": "ab"}
    work.phase("gptq", depends)

    changed = {"tokens": "cd", "gptq": {"steps": 3}, "damp": 0.5, "bits": 2}

    assert work.differences("gptq", changed) == [
        "bits was 3, is 2",
        "gptq changed",
        "tokens changed",
    ]
    assert work.differences("gptq", depends | {"damp": 1.0}) == ["damp was 0.5, is 1.0"]


def test_without_an_earlier_run_there_is_no_difference(work: WorkDir) -> None:
    depends = {"bits": 3}

    assert work.differences("gptq", depends) == []
    work.phase("gptq", depends)
    assert work.differences("gptq", depends) == []
    # Another phase, and a phase that depends on more: no run to compare with.
    assert work.differences("gradients", {"bits": 2}) == []
    assert work.differences("gptq", {"bits": 2, "outliers": 1}) == []


def test_of_earlier_runs_the_nearest_is_told(work: WorkDir) -> None:
    for bits, size in ((3, 32), (4, 64)):
        work.phase("gptq", {"bits": bits, "size": size, "dtype": "bfloat16"})

    depends = {"bits": 2, "size": 64, "dtype": "bfloat16"}

    assert work.differences("gptq", depends) == ["bits was 4, is 2"]


def test_an_earlier_run_that_a_crash_has_cut_is_not_told(work: WorkDir) -> None:
    path = work.phase("gptq", {"bits": 3}).folder / "depends.json"
    truncate(path, 4)

    assert work.differences("gptq", {"bits": 2}) == []
    assert work.phase("gptq", {"bits": 3}).is_empty
    assert work.differences("gptq", {"bits": 2}) == ["bits was 3, is 2"]


def test_a_work_folder_of_the_user_stays(tmp_path: Path) -> None:
    with open_workdir(tmp_path / "work", tmp_path / "out", World()) as work:
        folder = work.phase("gptq", {}).folder

    assert folder.parent == tmp_path / "work"
    assert folder.is_dir()


def test_a_work_folder_of_the_user_stays_when_a_run_fails_at_once(
    tmp_path: Path,
) -> None:
    """Whatever lies in it."""
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "notes.txt").touch()

    def fail() -> None:
        with open_workdir(folder, tmp_path / "out", World()):
            raise QuantizeError("no such source")

    with pytest.raises(QuantizeError, match="no such source"):
        fail()

    assert (folder / "notes.txt").exists()


def test_the_hidden_folder_goes_when_all_is_done(tmp_path: Path) -> None:
    with open_workdir(None, tmp_path / "out", World()) as work:
        work.phase("gptq", {}).save("block", {"a": torch.ones(1)})
        assert [path.name for path in tmp_path.iterdir()] == [".out.work"]

    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_the_hidden_folder_of_a_failed_run_is_found_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    def fail() -> None:
        with open_workdir(None, tmp_path / "out", World()) as work:
            work.phase("gptq", {}).save("block", {"a": torch.ones(1)})
            raise error

    with pytest.raises(error):
        fail()

    monkeypatch.chdir(tmp_path)
    with open_workdir(None, Path("out"), World()) as work:
        assert "block" in work.phase("gptq", {})
    assert not list(tmp_path.iterdir())


def test_a_run_that_fails_at_once_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with open_workdir(None, tmp_path / "out", World()) as work:
            work.phase("calibration", {"seed": 0})
            raise QuantizeError("no such source")

    with pytest.raises(QuantizeError, match="no such source"):
        fail()

    assert not list(tmp_path.iterdir())


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    """And the one that is refused leaves the other's as it is."""

    def run(folder: Path | None, output: str) -> None:
        with open_workdir(folder, tmp_path / output, World()):
            pass

    for folder, output in ((None, "out"), (tmp_path / "work", "other")):
        with open_workdir(folder, tmp_path / "out", World()) as work:
            phase = work.phase("calibration", {"seed": 0})
            with pytest.raises(QuantizeError, match="another process is at work"):
                run(folder, output)
            assert phase.folder.is_dir()
        run(folder, output)


def test_outputs_have_hidden_folders_of_their_own(tmp_path: Path) -> None:
    with (
        open_workdir(None, tmp_path / "a", World()) as first,
        open_workdir(None, tmp_path / "b", World()) as second,
    ):
        assert first.folder != second.folder


def test_only_the_leader_removes_the_hidden_folder(tmp_path: Path) -> None:
    with open_workdir(None, tmp_path / "out", World()) as work:
        work.phase("gptq", {})
        follower = World(rank=1, size=1)
        with open_workdir(None, tmp_path / "out", follower):
            pass
        assert work.folder.is_dir()

    assert not work.folder.exists()


def test_what_a_killed_run_has_left_beside_its_output_is_named(tmp_path: Path) -> None:
    output, left = tmp_path / "out", tmp_path / ".out.work"
    output.mkdir()
    (output / "config.json").touch()
    with pytest.raises(QuantizeError, match=r"choose another --output$"):
        check_output(output)

    left.mkdir()

    words = f"choose another --output; a stopped run has left {left}: delete it unless"
    with pytest.raises(QuantizeError, match=re.escape(words)):
        check_output(output)
    assert left.is_dir()


def test_an_output_that_is_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    check_output(tmp_path / "target")

    for name in ("target", "nowhere"):
        link = tmp_path / f"to-{name}"
        link.symlink_to(tmp_path / name)
        with pytest.raises(QuantizeError, match=f"to-{name}: is a link; choose"):
            check_output(link)


def test_an_output_that_is_the_current_folder_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    for output in (Path(), tmp_path):
        with pytest.raises(QuantizeError, match="is the current folder; choose"):
            check_output(output)


def test_an_output_that_is_a_mount_point_is_refused(
    mount: Callable[..., Path],
) -> None:
    output = mount("size=1m")

    with pytest.raises(QuantizeError, match="is a mount point; choose"):
        check_output(output)
    check_output(output / "out")


def test_an_output_around_the_work_folder_is_refused(tmp_path: Path) -> None:
    output = tmp_path / "out"

    for work_dir in (output, output / "work", tmp_path / "a" / ".." / "out" / "work"):
        with pytest.raises(QuantizeError, match="out: --work-dir lies in it"):
            check_output(output, work_dir)
    check_output(output, tmp_path / ".out.work")


def test_an_output_in_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    for output in (tmp_path / "file" / "out", tmp_path / "file" / "deep" / "out"):
        with pytest.raises(QuantizeError, match="file is a file; choose another"):
            check_output(output)
