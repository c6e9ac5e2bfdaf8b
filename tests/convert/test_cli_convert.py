"""`tacq export` and `tacq import`, on tiny models."""

from pathlib import Path

from tacq_vllm.format.checkpoint import WEIGHTS_NAME, read_schema
from tests.convert.sources import save_gptq
from tests.test_cli import assert_one_line, tacq


def test_export(tiny_checkpoint: Path, tmp_path: Path) -> None:
    arguments = ["export", tiny_checkpoint, "--to", "dequantized", "--output"]

    result = tacq(*arguments, tmp_path / "out")

    assert result.exit_code == 0, result.stderr
    assert result.stdout == f"{tmp_path / 'out'}: dequantized\n"
    assert (tmp_path / "out" / WEIGHTS_NAME).is_file()
    assert_one_line(tacq(*arguments, tmp_path / "out"), "choose another --output")


def test_export_what_is_no_checkpoint(tiny_model: Path, tmp_path: Path) -> None:
    result = tacq(
        "export", tiny_model, "--to", "dequantized", "--output", tmp_path / "out"
    )

    assert_one_line(result, "not a TaCQ checkpoint")


def test_import(tiny_model: Path, tmp_path: Path) -> None:
    save_gptq(tiny_model, tmp_path / "gptq", 4, 32, sym=True, version=1)
    arguments = ["import", tmp_path / "gptq", "--output", tmp_path / "out"]

    result = tacq(*arguments, "--base", tiny_model, "--outlier-ratio", "0.001")

    assert result.exit_code == 0, result.stderr
    assert result.stdout == f"{tmp_path / 'out'}: imported\n"
    assert sum(read_schema(tmp_path / "out").circuits["default"].values()) == 73
    assert_one_line(tacq(*arguments), "choose another --output")


def test_import_what_is_not_quantized(tiny_model: Path, tmp_path: Path) -> None:
    result = tacq("import", tiny_model, "--output", tmp_path / "out")

    assert_one_line(result, "quant_method is None; gptq and compressed-tensors can be")


def test_import_what_does_not_exist(tmp_path: Path) -> None:
    result = tacq("import", tmp_path / "nowhere", "--output", tmp_path / "out")

    assert_one_line(result, "nowhere: no such folder here, and the Hub")


def test_import_a_gguf_file(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()

    result = tacq("import", tmp_path / "model.gguf", "--output", tmp_path / "out")

    assert_one_line(result, "a .gguf file; give a folder or a Hub id")
