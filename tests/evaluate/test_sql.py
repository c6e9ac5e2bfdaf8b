"""Queries that a model may write: harmless in effect and in time."""

import hashlib
import sqlite3
import time
from pathlib import Path

import pytest

from tacq_vllm.evaluate.sql.judge import Judge
from tacq_vllm.evaluate.sql.results import same_results
from tacq_vllm.evaluate.sql.worker import MAX_ROWS, QueryError, run_query
from tests.evaluate.conftest import make_database

GOLD = "SELECT name FROM dogs WHERE age = 3"
NUMBERS = (
    "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n{}) SELECT {} FROM n"
)
HARMFUL = {
    "drop": "DROP TABLE dogs",
    "delete": "DELETE FROM dogs",
    "update": "UPDATE dogs SET age = 0",
    "insert": "INSERT INTO dogs VALUES ('Evil', 1)",
    "create": "CREATE TABLE cats (name text)",
    "temporary table": "CREATE TEMP TABLE cats (name text)",
    "attach": "ATTACH DATABASE '{folder}/new.sqlite' AS new",
    "vacuum": "VACUUM INTO '{folder}/new.sqlite'",
    "pragma": "PRAGMA writable_schema = 1",
    "pragma as a table": "SELECT * FROM pragma_database_list",
    "transaction": "BEGIN EXCLUSIVE",
    "two statements": f"{GOLD}; DROP TABLE dogs",
    "extension": "SELECT load_extension('evil')",
    "tokenizer": "SELECT fts3_tokenizer('simple')",
    "file": "SELECT writefile('{folder}/new', 'x')",
    "huge value": "SELECT zeroblob(2000000000)",
    "huge result": NUMBERS.format("", "i"),
    "no SQL": "I do not know.",
    "nothing": "",
    "null character": "SELECT 1 \0",
}
ENDLESS = {
    "recursive": NUMBERS.format("", "max(i)"),
    "joins": "SELECT count(*) FROM " + ", ".join(f"dogs d{n}" for n in range(40)),
    # Single steps of SQLite's machine, in which it does not look at the clock.
    "huge text": "SELECT printf('%.*c', 2000000000, 'x')",
    "memory": NUMBERS.format(" WHERE i < 90000", "hex(zeroblob(100000)) || i"),
}


@pytest.fixture
def database(tmp_path: Path) -> Path:
    return make_database(tmp_path / "dogs.sqlite")


def state(folder: Path) -> dict[str, str]:
    """Names and contents of all that is in a folder."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.iterdir()
    }


@pytest.mark.parametrize("name", HARMFUL)
def test_harmful_queries_fail_and_change_nothing(database: Path, name: str) -> None:
    query = HARMFUL[name].format(folder=database.parent)
    before = state(database.parent)

    with pytest.raises(QueryError) as error:
        run_query(database, query, 5.0)

    assert str(error.value)
    assert state(database.parent) == before


@pytest.mark.parametrize("name", ENDLESS)
def test_endless_queries_are_stopped(database: Path, name: str) -> None:
    before = state(database.parent)
    start = time.monotonic()

    with Judge(0.3) as judge:
        verdict = judge.verdict(database, GOLD, ENDLESS[name])
        # The next query is none the worse.
        following = judge.verdict(database, GOLD, GOLD)

    assert verdict.startswith("fails: ")
    assert following == "right"
    assert time.monotonic() - start < 10
    assert state(database.parent) == before


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        ("SELECT name FROM dogs WHERE age < 4", "right"),
        ("SELECT name FROM dogs WHERE age = 3 ORDER BY name", "right"),
        ("SELECT name FROM dogs", "wrong"),
        ("SELECT name, age FROM dogs WHERE age = 3", "wrong"),
        ("SELECT name FROM cats", "fails: no such table: cats"),
    ],
)
def test_verdicts(database: Path, answer: str, verdict: str) -> None:
    with Judge(5.0) as judge:
        assert judge.verdict(database, GOLD, answer) == verdict


def test_order_counts_where_the_right_query_orders(database: Path) -> None:
    with Judge(5.0) as judge:
        gold = "SELECT name FROM dogs ORDER\n BY name"
        assert judge.verdict(database, gold, "SELECT name FROM dogs") == "wrong"
        assert judge.verdict(database, gold, gold.replace("\n", "")) == "right"


def test_a_right_query_that_fails_is_told(database: Path) -> None:
    with Judge(5.0) as judge:
        assert judge.verdict(database, "SELECT", GOLD).startswith("gold: ")


def test_a_missing_database_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(QueryError, match="unable to open"):
        run_query(tmp_path / "none.sqlite", "SELECT 1", 5.0)

    assert list(tmp_path.iterdir()) == []


def test_a_database_whose_name_is_an_address(tmp_path: Path) -> None:
    database = make_database(tmp_path / "a?b#c%20d" / "dogs.sqlite")

    assert run_query(database, GOLD, 5.0) == [("Rex",), ("Bo",)]


def test_a_database_with_a_log_of_its_own_is_left_alone(database: Path) -> None:
    connection = sqlite3.connect(database)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.close()
    before = state(database.parent)

    assert run_query(database, GOLD, 5.0) == [("Rex",), ("Bo",)]
    assert state(database.parent) == before


def test_two_slow_queries_are_waited_for(
    database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tacq_vllm.evaluate.sql.judge._GRACE_SECONDS", 0.0)
    slow = NUMBERS.format(" WHERE i < 1000000", "max(i)")

    with Judge(5.0) as judge:
        assert judge.verdict(database, slow, slow) == "right"


def test_text_that_is_not_utf8(tmp_path: Path) -> None:
    connection = sqlite3.connect(tmp_path / "odd.sqlite")
    connection.execute("CREATE TABLE t AS SELECT CAST(x'ff41' AS text) AS a")
    connection.commit()
    connection.close()

    assert run_query(tmp_path / "odd.sqlite", "SELECT a FROM t", 5.0) == [("\ufffdA",)]


def test_many_rows_are_still_taken(database: Path) -> None:
    query = NUMBERS.format(f" WHERE i < {MAX_ROWS}", "i")

    assert len(run_query(database, query, 30.0)) == MAX_ROWS


@pytest.mark.parametrize(
    ("gold", "answer", "ordered", "same"),
    [
        ([(1, "a"), (2, "b")], [(2, "b"), (1, "a")], False, True),
        ([(1, "a"), (2, "b")], [(2, "b"), (1, "a")], True, False),
        ([(1, "a"), (2, "b")], [("a", 1), ("b", 2)], True, True),
        ([(1, 1), (2, 1)], [(1, 1), (1, 2)], False, True),
        # Each column has the right values, but not in the right rows.
        ([(1, 2), (2, 1), (3, 3)], [(1, 1), (2, 2), (3, 3)], False, False),
        ([(1,), (1,), (2,)], [(1,), (2,), (2,)], False, False),
        ([(1,)], [(1.0,)], False, True),
        ([(None,)], [(0,)], False, False),
        # A column counts once, however often its values are asked for.
        ([(1, 1)], [(1, 2)], False, False),
        ([], [], True, True),
        ([], [(1,)], False, False),
        ([(1,)], [(1, 1)], False, False),
    ],
)
def test_results(gold: list, answer: list, ordered: bool, same: bool) -> None:
    assert same_results(gold, answer, ordered=ordered) is same
