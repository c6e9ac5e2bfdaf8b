from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from tacq_vllm.format.staging import passing_folder, staged_file, staged_folder


def write_file(staging: Path) -> None:
    staging.write_text("data")


def write_folder(staging: Path) -> None:
    (staging / "file").write_text("data")


Stage = Callable[[Path], AbstractContextManager[Path]]
Write = Callable[[Path], None]


@pytest.fixture(params=[(staged_file, write_file), (staged_folder, write_folder)])
def staged(request: pytest.FixtureRequest) -> tuple[Stage, Write]:
    """A way to make something, and what makes it."""
    return request.param


def test_it_appears_when_it_is_whole(
    staged: tuple[Stage, Write], tmp_path: Path
) -> None:
    stage, write = staged
    final = tmp_path / "out"

    with stage(final) as staging:
        write(staging)
        assert not final.exists()

    assert (final / "file" if final.is_dir() else final).read_text() == "data"
    assert list(tmp_path.iterdir()) == [final]


def test_it_goes_when_the_body_fails(
    staged: tuple[Stage, Write], tmp_path: Path
) -> None:
    stage, write = staged

    def fail() -> None:
        with stage(tmp_path / "out") as staging:
            write(staging)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()

    assert not list(tmp_path.iterdir())


def test_a_file_that_was_there_stays_until_the_other_is_whole(tmp_path: Path) -> None:
    final = tmp_path / "out"
    final.write_text("old")

    def fail() -> None:
        with staged_file(final) as staging:
            staging.write_text("ne")
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        fail()

    assert final.read_text() == "old"
    assert list(tmp_path.iterdir()) == [final]


def test_a_folder_in_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with staged_folder(tmp_path / "new" / "out") as staging:
        write_folder(staging)

    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out"]


def test_leftovers_of_a_killed_run_are_replaced(tmp_path: Path) -> None:
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "old").write_text("old")

    with staged_folder(tmp_path / "out") as staging:
        assert not list(staging.iterdir())
        write_folder(staging)

    assert [path.name for path in (tmp_path / "out").iterdir()] == ["file"]


def test_a_folder_that_passes(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "old").write_text("of a killed run")

    with passing_folder(folder):
        assert not folder.exists()
        folder.mkdir()
        write_folder(folder)

    assert not list(tmp_path.iterdir())
