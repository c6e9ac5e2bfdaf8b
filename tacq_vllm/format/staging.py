"""Files and folders that get their names when they are whole."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_PARTIAL = ".partial"


def nearest_existing(path: Path) -> Path:
    """A path itself, or the nearest one above it that is there."""
    return next(p for p in (path, *path.absolute().parents) if p.exists())


@contextmanager
def named_errors(path: Path) -> Iterator[None]:
    """Give errors of the system the name of a file: writing has none to tell."""
    try:
        yield
    except OSError as error:
        # Those that have a text alone would lose it.
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


@contextmanager
def staged_file(final: Path) -> Iterator[Path]:
    """A name beside `final`, renamed to it when the body has written a file there."""
    staging = final.with_name(final.name + _PARTIAL)
    try:
        with named_errors(final):
            yield staging
    except BaseException:
        staging.unlink(missing_ok=True)
        raise
    os.replace(staging, final)


@contextmanager
def staged_folder(final: Path) -> Iterator[Path]:
    """A hidden folder beside `final`, renamed to it when the body has succeeded."""
    staging = final.parent / f".{final.name}{_PARTIAL}"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        yield staging
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    os.replace(staging, final)


@contextmanager
def passing_folder(folder: Path) -> Iterator[None]:
    """Remove a folder after the body, and before it one that a killed run left."""
    shutil.rmtree(folder, ignore_errors=True)
    try:
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)
