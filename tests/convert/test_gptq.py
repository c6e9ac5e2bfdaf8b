"""GPTQ's layout.

`RECORDED` are words that gptqmodel 7.7.0 writes: the function `pack_original` of its
`nn_modules/qlinear/__init__.py`, run on the codes and zero-points of `recorded_linear`,
and then `convert_gptq_v2_to_v1_format_module` of its `utils/model.py`.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen2Config

import tacq_vllm.integrations.transformers  # noqa: F401 - registers the quantizer
from tacq_vllm.convert.gptq import GptqLayout
from tacq_vllm.convert.importing import import_checkpoint
from tacq_vllm.format.checkpoint import WEIGHTS_NAME, read_schema
from tacq_vllm.format.schema import FormatError
from tacq_vllm.format.validation import find_faults
from tacq_vllm.quantize import source as model_source
from tacq_vllm.quantize.errors import QuantizeError
from tacq_vllm.quantize.progress import Progress
from tests.builders import Change, put, remove, replace, rewrite_tensors
from tests.conftest import SIZES, Recorder, save_random
from tests.convert.sources import (
    block_linears,
    gptq_tensors,
    rewrite_block,
    rewrite_config,
    save_gptq,
)

RECORDED = {
    2: {
        "row 3": "3c796d3c 6d3c796d",
        "row 20": "d01d01d0 01d01d01",
        "gptq_v2": "756241d0 018fcbab",
        "gptq": "200cec7b ac3a7656",
    },
    3: {
        "row 3": "f5bb99d8 129d0fc3 bb99d8ad",
        "row 20": "59001744 90017441 00174415",
        "gptq_v2": "a6305640 7597ac92 821d1b73",
        "gptq": "5d0fc43f e34e8800 7d8ad24e",
    },
    4: {
        "row 3": "5e71c730 8bf49f6d 53211235 d6f94fb8",
        "row 20": "08093d84 bd048d39 0db98889 08093d84",
        "gptq_v2": "1c853100 d39192c6 3467ae27 40c96433",
        "gptq": "0b741fef c28081b5 23569d16 2fb85322",
    },
}
LINEAR = "model.layers.1.mlp.up_proj"
EXPERT = "model.layers.0.mlp.experts.0.up_proj"


def recorded_linear(bits: int) -> tuple[Tensor, Tensor]:
    """Codes [32, 32] and zero-points [32, 1]."""
    rows, columns = torch.arange(32)[:, None], torch.arange(32)[None]
    codes = rows * columns + columns * columns // 3 + rows // 5
    return codes % 2**bits, (rows**2 // 3 + rows // 7) % 2**bits


def words(tensor: Tensor) -> str:
    return " ".join(f"{word & 0xFFFFFFFF:08x}" for word in tensor.tolist())


@pytest.mark.parametrize("bits", RECORDED)
@pytest.mark.parametrize("version", [1, 2])
def test_words_of_the_package_are_read(bits: int, version: int) -> None:
    codes, zeros = recorded_linear(bits)
    scales = torch.rand(32, 1).half()

    packed = gptq_tensors(codes, zeros, scales, bits, version)
    name = "gptq" if version == 1 else "gptq_v2"
    layout = GptqLayout(bits=bits, group_size=-1, checkpoint_format=name)
    linear = layout.unpack(packed, 32, 32)

    assert words(packed["qweight"][:, 3]) == RECORDED[bits]["row 3"]
    assert words(packed["qweight"][:, 20]) == RECORDED[bits]["row 20"]
    assert words(packed["qzeros"][0]) == RECORDED[bits][name]
    assert torch.equal(linear.codes.long(), codes)
    assert torch.equal(linear.zeros.long(), zeros)
    assert torch.equal(linear.scales, scales)
    expected = (codes - zeros).float() * scales.float()
    assert torch.equal(linear.dequantize(), expected)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("version", [1, 2])
@torch.no_grad()
def test_weights_and_logits_are_those_of_the_source(
    tiny_model: Path, tmp_path: Path, tokens: Tensor, bits: int, sym: bool, version: int
) -> None:
    group_size = 32 if sym else -1
    source = save_gptq(tiny_model, tmp_path / "gptq", bits, group_size, sym, version)
    recorder = Recorder()

    import_checkpoint(
        str(tmp_path / "gptq"), tmp_path / "tacq", Progress(recorder), None, None
    )

    assert find_faults(tmp_path / "tacq") == []
    assert recorder.phases == {"import": 14}
    schema = read_schema(tmp_path / "tacq")
    assert (schema.bits, schema.group_size, schema.dtype) == (
        bits,
        group_size,
        "float16",
    )
    assert sum(schema.circuits["default"].values()) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "tacq", dtype=torch.float32)
    for name, linear in block_linears(source):
        weight = model.get_submodule(name).dequantize(torch.float32)
        assert torch.equal(weight, linear.weight)
    logits = model.eval()(tokens).logits
    torch.testing.assert_close(logits, source(tokens).logits, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_biases(tmp_path: Path, tokens: Tensor) -> None:
    """As Qwen2's attention has them."""
    base = save_random(Qwen2Config(**SIZES), tmp_path / "base")
    source = save_gptq(base, tmp_path / "gptq", 4, 32, sym=True, version=1)

    import_checkpoint(str(tmp_path / "gptq"), tmp_path / "tacq", Progress())

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "tacq", dtype=torch.float32)
    bias = "model.layers.1.self_attn.q_proj.bias"
    assert torch.equal(model.get_parameter(bias), source.get_parameter(bias))
    logits = model.eval()(tokens).logits
    torch.testing.assert_close(logits, source(tokens).logits, rtol=1e-5, atol=1e-5)


def test_either_name_of_the_format() -> None:
    block = {"bits": 4, "group_size": 32, "format": "gptq_v2"}

    assert GptqLayout.parse(block).checkpoint_format == "gptq_v2"
    both = GptqLayout.parse(block | {"checkpoint_format": "gptq"})
    assert both.checkpoint_format == "gptq"


@pytest.fixture(scope="module")
def gptq_folder(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "tiny-gptq"
    save_gptq(tiny_model, path, 4, 32, sym=True, version=1)
    return path


@pytest.fixture
def gptq_copy(gptq_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(gptq_folder, tmp_path / "gptq"))


def test_a_hub_id(
    gptq_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the Hub's client downloads is imported; where it lies is not told."""

    def download(repo_id: str, allow_patterns: list[str]) -> str:
        assert repo_id == "org/name"
        return str(gptq_folder)

    monkeypatch.setattr(model_source, "snapshot_download", download)

    import_checkpoint("org/name", tmp_path / "out", Progress())

    assert read_schema(tmp_path / "out").recipe["source"] == "org/name"
    assert "# org/name, as a TaCQ" in (tmp_path / "out" / "README.md").read_text()


def test_tensors_that_are_not_quantized_are_copied(
    gptq_folder: Path, tmp_path: Path
) -> None:
    import_checkpoint(str(gptq_folder), tmp_path / "out", Progress())

    source, stored = (
        load_file(path / WEIGHTS_NAME) for path in (gptq_folder, tmp_path / "out")
    )
    linears = read_schema(tmp_path / "out").linears
    others = {name for name in source if name.rpartition(".")[0] not in linears}
    assert others == {name for name in stored if name.rpartition(".")[0] not in linears}
    assert len(others) == 7
    assert all(torch.equal(source[name], stored[name]) for name in others)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (tmp_path / "out" / name).read_text()
        assert text == (gptq_folder / name).read_text()


def test_what_the_older_configuration_file_says(
    gptq_copy: Path, tmp_path: Path
) -> None:
    """It does not name the method, which only GPTQ's tools wrote so."""
    config = json.loads((gptq_copy / "config.json").read_text())
    block = config.pop("quantization_config")
    del block["quant_method"], block["checkpoint_format"]
    (gptq_copy / "quantize_config.json").write_text(json.dumps(block))
    (gptq_copy / "config.json").write_text(json.dumps(config))

    import_checkpoint(str(gptq_copy), tmp_path / "out", Progress())

    assert read_schema(tmp_path / "out").recipe["format"] == "gptq"


def test_biases_of_zeros_that_the_model_does_not_have(
    gptq_copy: Path, tmp_path: Path
) -> None:
    bias = f"{LINEAR}.bias"
    rewrite_tensors(gptq_copy, lambda t: t.update({bias: torch.zeros(128)}))
    import_checkpoint(str(gptq_copy), tmp_path / "out", Progress())
    assert find_faults(tmp_path / "out") == []

    rewrite_tensors(gptq_copy, replace(bias, put(3, 1.0)))
    with pytest.raises(QuantizeError, match=f"{bias}: the model has no such bias"):
        import_checkpoint(str(gptq_copy), tmp_path / "other", Progress())


def test_symmetric_zero_points_as_they_are_under_the_name_of_the_others(
    tiny_model: Path, tmp_path: Path
) -> None:
    """Some writers call `gptq` what is `gptq_v2`; symmetric ones tell which it is."""
    source = save_gptq(tiny_model, tmp_path / "gptq", 4, 32, sym=True, version=2)
    rewrite_block(tmp_path / "gptq", checkpoint_format="gptq")

    import_checkpoint(str(tmp_path / "gptq"), tmp_path / "tacq", Progress())

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "tacq", dtype=torch.float32)
    for name, linear in block_linears(source):
        weight = model.get_submodule(name).dequantize(torch.float32)
        assert torch.equal(weight, linear.weight)


def of_tensors(change: Change) -> Callable[[Path], None]:
    return lambda path: rewrite_tensors(path, change)


def of_block(**fields: object) -> Callable[[Path], None]:
    return lambda path: rewrite_block(path, **fields)


def swap_columns(order: Tensor) -> Tensor:
    return order.flip(0).contiguous()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (
            of_tensors(replace(f"{LINEAR}.g_idx", swap_columns)),
            f"{LINEAR}.g_idx: columns are grouped in activation order (desc_act",
        ),
        (
            of_tensors(remove(f"{LINEAR}.qzeros")),
            f"{LINEAR}.qzeros: the tensor is missing",
        ),
        (
            of_tensors(replace(f"{LINEAR}.scales", lambda t: t[:1].contiguous())),
            f"{LINEAR}.scales: is torch.float16 [1, 128], not torch.float16 or "
            "torch.bfloat16 [2, 128]",
        ),
        (
            of_tensors(replace(f"{LINEAR}.scales", lambda t: t.float())),
            f"{LINEAR}.scales: is torch.float32",
        ),
        (
            of_tensors(replace(f"{LINEAR}.scales", lambda t: t.bfloat16())),
            f"{LINEAR}: scales are torch.bfloat16, those of others torch.float16",
        ),
        (
            of_tensors(replace(f"{LINEAR}.scales", put(5, float("nan")))),
            f"{LINEAR}.scales: a value is not finite",
        ),
        (
            of_tensors(lambda t: t.update({f"{LINEAR}.extra": torch.zeros(1)})),
            f"{LINEAR}.extra: not a tensor of gptq",
        ),
        (
            of_tensors(lambda t: t.update({"lm_head.qweight": torch.zeros(1)})),
            "lm_head: not a linear of the decoder's blocks",
        ),
        (
            of_tensors(lambda t: t.update({f"{EXPERT}.qweight": torch.zeros(1)})),
            f"{EXPERT}: not a linear of the decoder's blocks",
        ),
        (
            of_tensors(
                lambda t: t.update({f"{LINEAR}.weight": t.pop(f"{LINEAR}.qweight")})
            ),
            f"{LINEAR}: not quantized, but ",
        ),
        (
            of_tensors(replace(f"{LINEAR}.qzeros", put(0, 1))),
            f"{LINEAR}.qzeros: not 8 everywhere, as those of a symmetric",
        ),
        (
            of_tensors(remove("model.norm.weight")),
            "gptq: not a whole model: model.safetensors: model.norm.weight: the tensor",
        ),
        (of_block(bits=8), "quantization: bits: Input should be 2, 3 or 4"),
        (of_block(bits=3), "qweight: is torch.int32 [8, 64], not torch.int32 [6, 64]"),
        (of_block(checkpoint_format="marlin"), "checkpoint_format: Input should be"),
        (of_block(is_marlin_format=True), "is_marlin_format: Input should be False"),
        (of_block(pack_dtype="int16"), "pack_dtype: Input should be 'int32'"),
        (of_block(group_size=0), "quantization: group_size."),
        (of_block(group_size=128), "group_size 128 does not divide its 64"),
        (of_block(quant_method="awq"), "quant_method is 'awq'; gptq and compressed"),
    ],
)
def test_what_tacq_cannot_store_is_refused(
    gptq_copy: Path, tmp_path: Path, damage: Callable[[Path], None], reason: str
) -> None:
    damage(gptq_copy)

    with pytest.raises(QuantizeError) as caught:
        import_checkpoint(str(gptq_copy), tmp_path / "out", Progress())

    assert reason in str(caught.value)
    assert {path.name for path in tmp_path.iterdir()} == {"gptq"}


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"hidden_size": "64"}, "Validation error for field 'hidden_size': TypeError"),
        ({"hidden_act": "none"}, "KeyError: 'none'"),
        ({"num_attention_heads": 0}, "ZeroDivisionError: integer modulo by zero"),
    ],
)
def test_a_configuration_that_makes_no_model(
    gptq_copy: Path, tmp_path: Path, fields: dict[str, object], reason: str
) -> None:
    rewrite_config(gptq_copy, **fields)

    with pytest.raises(QuantizeError) as caught:
        import_checkpoint(str(gptq_copy), tmp_path / "out", Progress())

    assert f"{gptq_copy}: cannot be loaded: " in str(caught.value)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_configuration_of_too_many_blocks(gptq_copy: Path, tmp_path: Path) -> None:
    """Of a stranger's there may be so many that it takes hours to make them."""
    rewrite_config(gptq_copy, num_hidden_layers=64)

    with pytest.raises(FormatError, match="64 blocks, but the files hold 63 tensors"):
        import_checkpoint(str(gptq_copy), tmp_path / "out", Progress())


@pytest.mark.parametrize("model_type", ["evil", "vit"])
def test_code_that_comes_with_the_source(
    gptq_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_type: str
) -> None:
    """Of a configuration that is not known, or of its model; nobody is asked."""
    marker = tmp_path / "marker"
    code = "from transformers import LlamaConfig as EvilConfig\n"
    code += "from transformers import LlamaForCausalLM as EvilModel\n"
    (gptq_copy / "evil.py").write_text(f"{code}open({str(marker)!r}, 'w')\n")
    auto_map = {"AutoConfig": "evil.EvilConfig"}
    auto_map["AutoModelForCausalLM"] = "evil.EvilModel"
    rewrite_config(gptq_copy, model_type=model_type, auto_map=auto_map)
    monkeypatch.setattr("builtins.input", lambda prompt: "y")

    with pytest.raises(QuantizeError, match="cannot be loaded: "):
        import_checkpoint(str(gptq_copy), tmp_path / "out", Progress())

    assert not marker.exists()


def test_groups_that_tacq_does_not_have(tiny_model: Path, tmp_path: Path) -> None:
    save_gptq(tiny_model, tmp_path / "gptq", 4, 8, sym=True, version=1)

    with pytest.raises(QuantizeError, match="group_size 8: not -1 or 16, 32"):
        import_checkpoint(str(tmp_path / "gptq"), tmp_path / "out", Progress())
