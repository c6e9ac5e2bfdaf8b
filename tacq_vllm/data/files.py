"""Plain and gzipped files of text, JSON and JSON lines."""

import gzip
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from tacq_vllm.data.errors import DataError


def find_file(folder: Path, *names: str) -> Path:
    """The first of `names`, each as it is or with `.gz`, that is in `folder`.

    Raises:
        DataError: there is none.
    """
    wanted = [name + suffix for name in names for suffix in ("", ".gz")]
    for name in wanted:
        if (folder / name).is_file():
            return folder / name
    others = ", ".join(wanted[1:])
    raise DataError(f"{folder / wanted[0]}: no such file (nor {others})")


def read_text(path: Path) -> str:
    """The whole file.

    Raises:
        DataError: it is missing, cut short, or not UTF-8.
    """
    with _opened(path) as file:
        return file.read()


def read_json(path: Path) -> Any:
    """The one JSON value of a file.

    Raises:
        DataError: as `read_text`, or it is not JSON.
    """
    return _parse(read_text(path), str(path))


def read_json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Each line's place ("FILE, line N") and value; blank lines are skipped.

    Raises:
        DataError: as `read_text`, or a line is not JSON.
    """
    with _opened(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                where = f"{path}, line {number}"
                yield where, _parse(line, where)


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON: {error}") from error


@contextmanager
def _opened(path: Path) -> Iterator[IO[str]]:
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            yield file
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path}: cannot be read: {reason}") from error
