"""JSON objects out of strangers' files."""

import json
from collections import Counter
from pathlib import Path
from typing import Any, Final

from tacq_vllm.format.schema import FormatError

MAX_BYTES: Final = 100_000_000
"""The largest header that safetensors reads; no config.json comes near it."""


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        FormatError: the file or its folder is missing, or it is too large, not UTF-8,
            or holds something else, or an object in it has a key twice.
    """
    if not path.parent.is_dir():
        raise FormatError(f"{path.parent}: there is no such folder")
    # Of a pipe or a device the end might never come.
    if not path.is_file():
        raise FormatError(f"{path}: the file is missing")
    try:
        if path.stat().st_size > MAX_BYTES:
            raise FormatError(f"{path}: larger than {MAX_BYTES:,} bytes")
        content = path.read_bytes()
    except OSError as error:
        raise FormatError(f"{path}: cannot be read: {error.strerror}") from error
    return parse_json(content, str(path))


def parse_json(content: bytes, where: str) -> dict[str, Any]:
    """Parse a JSON object; `where` is what errors call it.

    Raises:
        FormatError: as `read_json`.
    """
    try:
        value = json.loads(content.decode(), object_pairs_hook=_unique_keys)
    except (_DoubleKey, ValueError, RecursionError) as error:
        reason = str(error) if isinstance(error, _DoubleKey) else f"not JSON: {error}"
        raise FormatError(f"{where}: {reason}") from error
    if not isinstance(value, dict):
        raise FormatError(f"{where}: not a JSON object")
    return value


def check_keys(content: bytes, where: str) -> None:
    """Refuse an object with a key twice, without keeping what it holds.

    Raises:
        FormatError: naming the key.
    """

    def forget(pairs: list[tuple[str, Any]]) -> None:
        _unique_keys(pairs)

    try:
        json.loads(content.decode(), object_pairs_hook=forget)
    except _DoubleKey as error:
        raise FormatError(f"{where}: {error}") from error


class _DoubleKey(Exception):
    """Readers would differ in which of the two they take."""


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        (double, _), *_ = counts.most_common(1)
        raise _DoubleKey(f"{double!r} is there twice")
    return content
