"""Rows of a data set, from a folder of files or from the Hugging Face Hub."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tacq_vllm.data.errors import DataError
from tacq_vllm.data.files import find_file, read_json_lines


@dataclass(frozen=True)
class HubTable:
    """One split of a data set on the Hub."""

    repository: str
    split: str
    configuration: str | None = None
    data_file: str | None = None
    """The only file to read of a split of many."""


@dataclass(frozen=True)
class Table:
    """The same rows in a folder and on the Hub."""

    file: str
    """JSON lines; a name with `.gz` is found too."""
    hub: HubTable


def read_rows(table: Table, data_root: Path | None) -> Iterator[tuple[str, Any]]:
    """Each row's place and value, from `data_root` or, without one, from the Hub."""
    if data_root is None:
        return read_hub(table.hub)
    return read_json_lines(find_file(data_root, table.file))


def read_hub(table: HubTable) -> Iterator[tuple[str, Any]]:
    """Each row's place ("REPOSITORY SPLIT, row N") and value.

    Raises:
        DataError: `datasets` is not installed, or it fails.
    """
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"{table.repository}: reading the Hub needs the package `datasets` "
            f"({error}): pip install 'tacq-vllm[quantize]', or give the files "
            "with --data-root"
        ) from error
    file = None if table.data_file is None else {table.split: table.data_file}
    try:
        rows = datasets.load_dataset(
            table.repository, table.configuration, split=table.split, data_files=file
        )
        for number, row in enumerate(rows, start=1):
            yield f"{table.repository} {table.split}, row {number}", row
    except Exception as error:  # Its network, file and table layers all differ.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"{table.repository} {table.split}: cannot be read from the Hub: "
            f"{reason}; give the files with --data-root"
        ) from error
