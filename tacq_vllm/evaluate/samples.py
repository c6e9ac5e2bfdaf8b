"""The log of every answer and score: JSON lines by key, from which a run goes on."""

import json
from pathlib import Path
from typing import Any

from tacq_vllm.evaluate.errors import EvaluateError
from tacq_vllm.format.staging import named_errors


class SampleLog:
    """Lines by key; what is new is added to the file at once.

    Args:
        path: the file, which may be there from an earlier run; None: memory alone.

    Raises:
        EvaluateError: the file is something else.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._lines: dict[str, dict[str, Any]] = {}
        if path is not None and path.exists():
            self._read(path)

    def get(self, key: str) -> dict[str, Any] | None:
        """The line with that key, if there is one."""
        return self._lines.get(key)

    def add(self, key: str, line: dict[str, Any]) -> None:
        """Add a line, unless one has that key."""
        if key in self._lines:
            return
        self._lines[key] = line
        if self._path is not None:
            text = json.dumps({**line, "key": key}, ensure_ascii=False)
            with (
                named_errors(self._path),
                self._path.open("a", encoding="utf-8") as file,
            ):
                file.write(text + "\n")

    def _read(self, path: Path) -> None:
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        for number, text in enumerate(content[:whole].splitlines(), start=1):
            try:
                line = json.loads(text)
                self._lines[line.pop("key")] = line
            except (
                ValueError,
                KeyError,
                TypeError,
                AttributeError,
                RecursionError,
            ) as error:
                raise EvaluateError(
                    f"{path}, line {number}: not a line of a sample log; give another "
                    "file for --samples"
                ) from error
        if content and not whole:
            raise EvaluateError(
                f"{path}: no line of a sample log; give another file for --samples"
            )
        if whole < len(content):
            # A killed run was about to write this line.
            with path.open("r+b") as file:
                file.truncate(whole)
