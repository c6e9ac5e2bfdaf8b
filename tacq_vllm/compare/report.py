"""The files that a comparison leaves: a table, all rows, pictures."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from tacq_vllm.compare.rows import RESULTS_NAME, Row, write_results
from tacq_vllm.compare.table import write_table
from tacq_vllm.format.staging import staged_file

TABLE_NAME = "table.md"


def write_report(rows: Sequence[Row], folder: Path) -> str:
    """Write them, pictures where matplotlib is installed; gives the table."""
    write_results(folder / RESULTS_NAME, rows)
    table = write_table(rows)
    with staged_file(folder / TABLE_NAME) as staging:
        staging.write_text(table, encoding="utf-8")
    if find_spec("matplotlib"):
        from tacq_vllm.compare.pictures import draw_pictures

        draw_pictures(rows, folder)
    return table
