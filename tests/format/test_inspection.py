import json
from math import prod
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tacq_vllm.cli import app
from tacq_vllm.format.checkpoint import WEIGHTS_NAME
from tacq_vllm.format.inspection import inspect_checkpoint, outlier_counts
from tacq_vllm.format.schema import FormatError
from tests.builders import rewrite_tensors, truncate

ITEM_BYTES = {"I32": 4, "BF16": 2, "F16": 2}


def raw_bytes(path: Path) -> dict[str, int]:
    """Bytes of each tensor, from the header of a safetensors file alone."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__")
    sizes = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        assert end - begin == prod(entry["shape"]) * ITEM_BYTES[entry["dtype"]]
        sizes[name] = end - begin
    return sizes


def linear_bytes(folder: Path, linear: str) -> int:
    return sum(
        size
        for name, size in raw_bytes(folder / WEIGHTS_NAME).items()
        if name.startswith(f"{linear}.")
    )


def test_bits_are_those_of_the_files(tiny_checkpoint: Path) -> None:
    figures = inspect_checkpoint(tiny_checkpoint)

    total = 0
    for linear in figures.linears:
        nbytes = linear_bytes(tiny_checkpoint, linear.name)
        weights = linear.out_features * linear.in_features
        assert linear.nbytes == nbytes
        assert linear.effective_bits == nbytes * 8 / weights
        total += nbytes
    assert len(figures.linears) == 14
    assert figures.weights == 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 128)
    assert figures.outliers == int(0.0035 * figures.weights)
    assert figures.linear_bytes == total
    assert figures.effective_bits == total * 8 / figures.weights
    assert figures.checkpoint_bytes == (tiny_checkpoint / WEIGHTS_NAME).stat().st_size
    ratio = figures.outliers / figures.weights
    assert figures.paper_bits == pytest.approx(3 - 3 * ratio + 32 * ratio)


def test_json_has_the_same_figures(tiny_checkpoint: Path) -> None:
    result = CliRunner().invoke(app, ["inspect", str(tiny_checkpoint), "--json"])

    shown = json.loads(result.stdout)
    total = sum(
        linear_bytes(tiny_checkpoint, linear["name"]) for linear in shown["linears"]
    )
    assert shown["linear_bytes"] == total
    assert shown["effective_bits"] == total * 8 / shown["weights"]
    for linear in shown["linears"]:
        assert linear["nbytes"] == linear_bytes(tiny_checkpoint, linear["name"])


def test_blocks_are_in_numeric_order(tiny_checkpoint: Path, tmp_path: Path) -> None:
    config = json.loads((tiny_checkpoint / "config.json").read_text())
    block = config["quantization_config"]
    renamed = {"layers.1.": "layers.10.", "layers.0.": "layers.9."}

    def rename(name: str) -> str:
        for old, new in renamed.items():
            name = name.replace(old, new)
        return name

    block["linears"] = {rename(k): v for k, v in block["linears"].items()}
    counts = block["circuits"]["default"]
    block["circuits"]["default"] = {rename(k): v for k, v in counts.items()}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / WEIGHTS_NAME).write_bytes((tiny_checkpoint / WEIGHTS_NAME).read_bytes())
    rewrite_tensors(
        tmp_path,
        lambda tensors: [
            tensors.update({rename(name): tensors.pop(name)}) for name in list(tensors)
        ],
    )

    names = [linear.name for linear in inspect_checkpoint(tmp_path).linears]

    assert [name.split(".")[2] for name in names] == ["9"] * 7 + ["10"] * 7


def test_outlier_counts_by_row_and_column(tiny_checkpoint: Path) -> None:
    linears = inspect_checkpoint(tiny_checkpoint).linears

    for linear, counts in zip(linears, outlier_counts(tiny_checkpoint), strict=True):
        assert counts.name == linear.name
        assert counts.per_row.shape == (linear.out_features,)
        assert counts.per_column.shape == (linear.in_features,)
        totals = {int(counts.per_row.sum()), int(counts.per_column.sum())}
        assert totals == {linear.outliers}


def test_broken_checkpoints_are_refused(checkpoint_copy: Path) -> None:
    truncate(checkpoint_copy / WEIGHTS_NAME)

    with pytest.raises(FormatError, match="truncated"):
        inspect_checkpoint(checkpoint_copy)
