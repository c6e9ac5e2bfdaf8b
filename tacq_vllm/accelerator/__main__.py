"""Print the tables of the accelerator's README, or write them into it.

python -m tacq_vllm.accelerator [--model SMOLLM2.gguf] [--write README.md]
"""

import argparse
import sys
from pathlib import Path

from tacq_vllm.accelerator.layers import MissingModelError
from tacq_vllm.accelerator.report import (
    area_table,
    layer_tables,
    layers,
    replace_tables,
    tile_table,
)


def main(arguments: list[str] | None = None) -> int:
    """Make the tables; 0, or 2 where the input is bad."""
    parser = argparse.ArgumentParser(
        prog="python -m tacq_vllm.accelerator", description=__doc__
    )
    parser.add_argument(
        "--model", type=Path, help="SmolLM2-135M as .gguf; random weights without it"
    )
    parser.add_argument("--write", type=Path, help="the page to put the tables into")
    options = parser.parse_args(arguments)
    try:
        page = options.write.read_text() if options.write else None
        tables = {"areas": area_table(), "one tile": tile_table()}
        if page is not None:
            # A page without places is refused before the minutes that layers take.
            replace_tables(page, {**tables, "layers": ""})
        tables["layers"] = layer_tables(layers(options.model))
        if page is None:
            print("\n\n".join(tables.values()))
        else:
            options.write.write_text(replace_tables(page, tables))
    except (MissingModelError, OSError, ValueError) as error:
        print(f"tacq: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
