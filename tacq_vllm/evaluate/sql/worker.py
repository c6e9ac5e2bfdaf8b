"""A process that runs queries; a program, which `sql.judge` starts.

What a query may do is limited three times over: the database is opened read-only and
as if nothing could change it; SQLite is asked to allow reading alone; the process may
write no file, and take no more memory than a fixed amount. It imports nothing large,
for it is started anew when a query has killed it.
"""

import json
import resource
import sqlite3
import sys
import time
from pathlib import Path
from typing import Any
from urllib.parse import quote

from tacq_vllm.evaluate.sql.results import Row, same_results

MAX_ROWS = 100_000
"""More are taken for a fault of the query."""

_MEMORY_BYTES = 1 << 30
_MAX_VALUE_BYTES = 1_000_000
_CHECK_EVERY = 1000
"""Steps of SQLite's machine between two looks at the clock."""

_ALLOWED = {
    sqlite3.SQLITE_SELECT,
    sqlite3.SQLITE_READ,
    sqlite3.SQLITE_FUNCTION,
    sqlite3.SQLITE_RECURSIVE,
}
_FORBIDDEN_FUNCTIONS = {"load_extension", "fts3_tokenizer", "readfile", "writefile"}


class QueryError(ValueError):
    """A query that gives no rows; the message says why."""


def run_query(database: Path, query: str, seconds: float) -> list[Row]:
    """The rows of a query that only reads.

    Raises:
        QueryError: it fails, does more than read, takes too long, or gives too much.
    """
    deadline = time.monotonic() + seconds
    address = f"file:{quote(str(database.absolute()))}?mode=ro&immutable=1"
    try:
        connection = sqlite3.connect(address, uri=True)
        try:
            # Real databases hold text in other encodings here and there.
            connection.text_factory = lambda raw: raw.decode(errors="replace")
            connection.execute("PRAGMA temp_store = MEMORY")
            connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _MAX_VALUE_BYTES)
            connection.setlimit(sqlite3.SQLITE_LIMIT_ATTACHED, 0)
            connection.set_authorizer(_authorize)
            connection.set_progress_handler(
                lambda: time.monotonic() > deadline, _CHECK_EVERY
            )
            cursor = connection.execute(query)
            if cursor.description is None:
                raise QueryError("not a query")
            rows: list[Row] = cursor.fetchmany(MAX_ROWS + 1)
        finally:
            connection.close()
    except (sqlite3.Error, sqlite3.Warning, ValueError, OverflowError) as error:
        raise QueryError(str(error)) from error
    except MemoryError as error:
        raise QueryError("out of memory") from error
    if len(rows) > MAX_ROWS:
        raise QueryError(f"more than {MAX_ROWS} rows")
    return rows


def _authorize(action: int, first: str | None, second: str | None, *_: Any) -> int:
    if action not in _ALLOWED:
        return sqlite3.SQLITE_DENY
    # The name of a function comes second.
    harmful = (second or "").lower() in _FORBIDDEN_FUNCTIONS
    if action == sqlite3.SQLITE_FUNCTION and harmful:
        return sqlite3.SQLITE_DENY
    return sqlite3.SQLITE_OK


def _judge(request: dict[str, Any]) -> str:
    """`right`, `wrong`, or why there is no answer."""
    database, seconds = Path(request["database"]), request["seconds"]
    try:
        gold = run_query(database, request["gold"], seconds)
    except QueryError as error:
        return f"gold: {error}"
    try:
        answer = run_query(database, request["answer"], seconds)
    except QueryError as error:
        return f"fails: {error}"
    # Rows are in an order where the right query asks for one.
    ordered = "order by" in " ".join(request["gold"].lower().split())
    return "right" if same_results(gold, answer, ordered=ordered) else "wrong"


def main() -> None:
    """Answer each request, a line of JSON, with a line of JSON."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    for line in sys.stdin:
        sys.stdout.write(json.dumps(_judge(json.loads(line))) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
