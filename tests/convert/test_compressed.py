"""The layout of compressed-tensors, written and read back by the package itself."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import tacq_vllm.integrations.transformers  # noqa: F401 - registers the quantizer
from tacq_vllm.convert.importing import import_checkpoint
from tacq_vllm.format.checkpoint import read_schema
from tacq_vllm.format.validation import find_faults
from tacq_vllm.quantize.errors import QuantizeError
from tacq_vllm.quantize.progress import Progress
from tests.builders import remove, replace, rewrite_tensors
from tests.conftest import make_tokenizer
from tests.convert.sources import block_linears, rewrite_block

pytest.importorskip("compressed_tensors", reason="it comes with vLLM")

from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    apply_quantization_config,
)
from transformers import CompressedTensorsConfig

pytestmark = pytest.mark.usefixtures("no_kernels")

LINEAR = "model.layers.1.mlp.up_proj"
WEIGHTS = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}


def one_group(**fields: object) -> dict[str, object]:
    """What a configuration says of weights that differ in some fields."""
    return {"config_groups": {"a": {"weights": WEIGHTS | fields}}}


def save_compressed(
    base: Path, folder: Path, bits: int, group_size: int | None, sym: bool
) -> None:
    """Save a model as the package does, rounded to the nearest."""
    model = AutoModelForCausalLM.from_pretrained(base)
    strategy = "group" if group_size else "channel"
    weights = QuantizationArgs(
        num_bits=bits, symmetric=sym, strategy=strategy, group_size=group_size
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    config = QuantizationConfig(config_groups={"all": scheme}, ignore=["lm_head"])
    apply_quantization_config(model, config)
    half, top = 2 ** (bits - 1), 2**bits - 1
    for _, linear in block_linears(model):
        groups = linear.weight.unflatten(1, (linear.weight_scale.shape[1], -1))
        low, high = groups.amin(-1).float(), groups.amax(-1).float()
        span = high - low if not sym else 2 * groups.abs().amax(-1).float()
        linear.weight_scale.data = (span / top).to(linear.weight.dtype)
        if not sym:
            zeros = (-low / linear.weight_scale).round() - half
            # Not all in the middle, and both ends of the range.
            zeros[:2] = torch.tensor([[-half], [half - 1]])
            linear.weight_zero_point.data = zeros.clamp(-half, half - 1).to(torch.int8)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    compressor.update_config(folder)


def decompressed(folder: Path) -> PreTrainedModel:
    """The model in 16 bits, decompressed by the package."""
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=CompressedTensorsConfig(dequantize=True)
    )


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("sym", [True, False])
@torch.no_grad()
def test_weights_and_logits_are_those_of_the_package(
    tiny_model: Path, tmp_path: Path, tokens: Tensor, bits: int, sym: bool
) -> None:
    group_size = None if bits == 3 else 32
    save_compressed(tiny_model, tmp_path / "source", bits, group_size, sym)

    import_checkpoint(str(tmp_path / "source"), tmp_path / "tacq", Progress())

    assert find_faults(tmp_path / "tacq") == []
    schema = read_schema(tmp_path / "tacq")
    assert (schema.bits, schema.group_size) == (bits, group_size or -1)
    assert len(schema.linears) == 14
    source = decompressed(tmp_path / "source")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "tacq")
    for name, linear in block_linears(source):
        weight = model.get_submodule(name).dequantize(torch.bfloat16)
        assert torch.equal(weight, linear.weight)
    dense = model.dequantize().eval()
    assert torch.equal(dense(tokens).logits, source.eval()(tokens).logits)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"format": "int-quantized"}, "format: Input should be 'pack-quantized'"),
        ({"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme: Input should be None"),
        ({"transform_config": {"a": 1}}, "transform_config: "),
        ({"sparsity_config": {"format": "dense"}}, "sparsity_config: "),
        ({"config_groups": {}}, "config_groups: "),
        (one_group(type="float"), "weights.type: Input should be 'int'"),
        (one_group(strategy="block"), "weights.strategy: Input should be 'group' or"),
        (one_group(num_bits=8), "weights.num_bits: Input should be 2, 3 or 4"),
        (
            {"config_groups": {"a": {"weights": WEIGHTS, "input_activations": {}}}},
            "input_activations: Input should be None",
        ),
        (
            {"config_groups": {"a": {"weights": WEIGHTS, "output_activations": {}}}},
            "output_activations: Input should be None",
        ),
    ],
)
def test_what_tacq_cannot_store_is_refused(
    tiny_model: Path, tmp_path: Path, fields: dict[str, object], reason: str
) -> None:
    save_compressed(tiny_model, tmp_path / "source", 4, 32, sym=True)
    rewrite_block(tmp_path / "source", **fields)

    with pytest.raises(QuantizeError) as caught:
        import_checkpoint(str(tmp_path / "source"), tmp_path / "out", Progress())

    assert reason in str(caught.value)


@pytest.mark.parametrize("fields", [{"num_bits": 2}, {"group_size": 64}])
def test_groups_that_differ(
    tiny_model: Path, tmp_path: Path, fields: dict[str, int]
) -> None:
    save_compressed(tiny_model, tmp_path / "source", 4, 32, sym=True)
    groups = {"a": {"weights": WEIGHTS}, "b": {"weights": WEIGHTS | fields}}
    rewrite_block(tmp_path / "source", config_groups=groups)

    with pytest.raises(QuantizeError, match="one num_bits and one group_size"):
        import_checkpoint(str(tmp_path / "source"), tmp_path / "out", Progress())


def test_symmetric_groups_beside_others(tiny_model: Path, tmp_path: Path) -> None:
    """Their linears have no zero-points."""
    save_compressed(tiny_model, tmp_path / "source", 4, 32, sym=True)
    groups = {
        "a": {"weights": WEIGHTS},
        "b": {"weights": WEIGHTS | {"symmetric": False}},
    }
    rewrite_block(tmp_path / "source", config_groups=groups)

    import_checkpoint(str(tmp_path / "source"), tmp_path / "out", Progress())

    assert find_faults(tmp_path / "out") == []


def test_columns_in_activation_order(tiny_model: Path, tmp_path: Path) -> None:
    save_compressed(tiny_model, tmp_path / "source", 4, 32, sym=True)
    groups = torch.arange(64, dtype=torch.int32) // 32
    name = f"{LINEAR}.weight_g_idx"
    rewrite_tensors(tmp_path / "source", lambda t: t.update({name: groups}))
    import_checkpoint(str(tmp_path / "source"), tmp_path / "ordered", Progress())
    assert find_faults(tmp_path / "ordered") == []

    rewrite_tensors(tmp_path / "source", replace(name, lambda t: t.flip(0)))
    with pytest.raises(QuantizeError, match=f"{name}: columns are grouped in"):
        import_checkpoint(str(tmp_path / "source"), tmp_path / "out", Progress())


def test_zero_points_that_are_missing(tiny_model: Path, tmp_path: Path) -> None:
    save_compressed(tiny_model, tmp_path / "source", 4, 32, sym=False)
    name = f"{LINEAR}.weight_zero_point"
    rewrite_tensors(tmp_path / "source", remove(name))

    with pytest.raises(QuantizeError, match=f"{name}: the tensor is missing"):
        import_checkpoint(str(tmp_path / "source"), tmp_path / "out", Progress())
