"""CREATE TABLE text of Spider's databases."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tacq_vllm.data.errors import DataError
from tacq_vllm.data.files import find_file, read_json
from tacq_vllm.data.tables import HubTable, read_hub

_FILE = "spider/schemas.json"
_HUB = HubTable("richardr1126/spider-schema", "train")
_HUB_COLUMN = re.compile(r"(.+) \((\w+)\)")


def read_schemas(data_root: Path | None) -> Mapping[str, str]:
    """The text by database, from `data_root` or, without one, from the Hub.

    The Hub has tables, columns and types only, so its text is without keys.

    Raises:
        DataError: the file or the Hub cannot be read, or a database is malformed.
    """
    if data_root is None:
        return dict(_hub_schema(where, row) for where, row in read_hub(_HUB))
    file = find_file(data_root, _FILE)
    match read_json(file):
        case dict(schemas):
            return {db: _file_schema(file, db, schemas[db]) for db in schemas}
    raise DataError(f"{file}: not an object of databases")


def _file_schema(file: Path, db: str, schema: Any) -> str:
    match schema:
        case {"ddl": str(ddl)}:
            return ddl
    raise DataError(f"{file}, {db!r}: `ddl` is not a string")


def _hub_schema(where: str, row: Any) -> tuple[str, str]:
    match row:
        case {"db_id": str(db), "Schema (values (type))": str(compact)}:
            return db, _write_tables(where, compact)
    raise DataError(
        f"{where}: `db_id` and `Schema (values (type))` are not both strings"
    )


def _write_tables(where: str, compact: str) -> str:
    """Expand `table : column (type) , column (type) | table : ...`."""
    statements = []
    for table in compact.split("|"):
        name, _, listed = table.partition(":")
        columns = []
        for text in listed.split(","):
            column = _HUB_COLUMN.fullmatch(text.strip())
            if column is None:
                raise DataError(f"{where}: not a `column (type)`: {text.strip()!r}")
            columns.append(f'  "{column[1]}" {column[2]}')
        body = ",\n".join(columns)
        statements.append(f'CREATE TABLE "{name.strip()}" (\n{body}\n);')
    return "\n".join(statements)
