"""Numbers that are out of the ordinary: right in the end, or refused by name."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

import tacq_vllm.integrations.transformers  # noqa: F401
from tacq_vllm.config import Recipe
from tacq_vllm.format.checkpoint import CheckpointReader, read_schema
from tacq_vllm.format.schema import FormatError
from tacq_vllm.format.validation import find_faults, load_linear
from tacq_vllm.quantize.errors import QuantizeError
from tests.builders import replace, rewrite_tensors, stored_weights
from tests.conftest import SIZES, open_model, quick, run_pipeline, save_model

ATTENTION = "model.layers.0.self_attn"
Q = f"{ATTENTION}.q_proj"
UP = "model.layers.0.mlp.up_proj"

Change = Callable[[PreTrainedModel], None]
Quantize = Callable[..., Path]


def parameter(model: PreTrainedModel, name: str) -> Tensor:
    return model.get_parameter(name).data


def put(name: str, index: Any, value: float) -> Change:
    """A change of one value, or of several, of a parameter."""

    def change(model: PreTrainedModel) -> None:
        parameter(model, name)[index] = value

    return change


@pytest.fixture
def quantize(tiny_recipe: Recipe, tmp_path: Path) -> Quantize:
    """Change a random model of one block, quantize it, and give the folder."""

    def make(
        change: Change, sizes: dict[str, Any] | None = None, **fields: Any
    ) -> Path:
        torch.manual_seed(0)
        config = LlamaConfig(**(SIZES | {"num_hidden_layers": 1} | (sizes or {})))
        model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
        change(model)
        base = open_model(save_model(model, tmp_path / "model"), tmp_path / "opened")
        recipe = quick(tiny_recipe, **fields)
        run_pipeline(base, recipe, tmp_path / "out", tmp_path / "work")
        return tmp_path / "out"

    return make


def assert_right(folder: Path, tokens: Tensor) -> PreTrainedModel:
    """It is whole, and says what its dequantized weights say."""
    assert find_faults(folder) == []
    packed = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits = packed(tokens).logits
        expected = dense.dequantize()(tokens).logits
    assert bool(logits.isfinite().all())
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    return packed


def unchanged(model: PreTrainedModel) -> None:
    """Leave a model as it is."""


def test_inputs_that_are_always_zero(quantize: Quantize, tokens: Tensor) -> None:
    dead = put("model.layers.0.input_layernorm.weight", slice(0, 64, 3), 0.0)

    folder = quantize(dead)

    assert_right(folder, tokens)


def test_no_input_at_all(quantize: Quantize, tokens: Tensor) -> None:
    """Rounded to nearest: nothing says which weights matter."""
    folder = quantize(put("model.layers.0.input_layernorm.weight", slice(None), 0.0))

    assert_right(folder, tokens)
    assert bool(stored_weights(folder)[Q].any())


@pytest.mark.parametrize("value", [0.0, 0.25, -3.0, 1e-30])
def test_constant_rows(quantize: Quantize, tokens: Tensor, value: float) -> None:
    folder = quantize(put(f"{Q}.weight", slice(0, 5), value), **{"outliers.ratio": 0.0})

    assert_right(folder, tokens)
    row = stored_weights(folder)[Q][0]
    # Errors of columns before move the ones after: near, not equal.
    assert bool(((row - value).abs() <= abs(value) / 4).all())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (f"{Q}.weight", float("nan")),
        (f"{ATTENTION}.o_proj.weight", float("inf")),
        ("model.layers.0.input_layernorm.weight", float("nan")),
        ("model.embed_tokens.weight", float("nan")),
        ("model.norm.weight", -float("inf")),
        ("lm_head.weight", float("nan")),
    ],
)
def test_a_model_that_is_not_finite(
    quantize: Quantize, tmp_path: Path, name: str, value: float
) -> None:
    with pytest.raises(QuantizeError, match=f"{name}: a value of the model is not fin"):
        quantize(put(name, slice(0, 64), value))
    assert not (tmp_path / "out").exists()


def test_activations_that_overflow(quantize: Quantize, tmp_path: Path) -> None:
    """Finite in 16 bits, and squared not in 32."""
    with pytest.raises(QuantizeError, match=rf"{ATTENTION}\S+, .*overflow"):
        quantize(put("model.layers.0.input_layernorm.weight", slice(None), 1e38))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("ratio", [0.05, 0.0])
def test_weights_that_float16_lacks(
    quantize: Quantize, tmp_path: Path, ratio: float
) -> None:
    fields = {"export.dtype": "float16", "outliers.ratio": ratio}
    with pytest.raises(QuantizeError, match=rf"{UP}\S*: .*not finite in torch.float16"):
        quantize(put(f"{UP}.weight", (3, 5), 1e6), **fields)
    assert not (tmp_path / "out").exists()


def test_small_weights_that_float16_lacks(quantize: Quantize, tokens: Tensor) -> None:
    tiny = put(f"{UP}.weight", slice(None), 1e-12)

    assert_right(quantize(tiny, **{"export.dtype": "float16"}), tokens)


@pytest.mark.parametrize("kept_value", ["original", "compensated"])
def test_rows_that_are_kept_whole(
    quantize: Quantize, tokens: Tensor, kept_value: str
) -> None:
    large = put(f"{Q}.weight", slice(0, 8), 40.0)
    fields = {
        "outliers.ratio": 0.05,
        "outliers.saliency": "magnitude",
        "outliers.kept_value": kept_value,
    }

    folder = quantize(large, **fields)

    assert_right(folder, tokens)
    with CheckpointReader(folder) as reader:
        table = load_linear(reader, read_schema(folder), Q).outliers
    assert table[:9].diff().tolist() == [64] * 8
    assert bool((stored_weights(folder)[Q][:8] == 40.0).all())


def test_nothing_is_kept(quantize: Quantize, tokens: Tensor) -> None:
    folder = quantize(unchanged, **{"outliers.ratio": 0.0})

    assert_right(folder, tokens)
    assert read_schema(folder).outlier_ratio == 0


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_columns_that_fill_no_word(
    quantize: Quantize, tokens: Tensor, bits: int
) -> None:
    sizes = {"hidden_size": 40, "intermediate_size": 76}

    folder = quantize(unchanged, sizes, group_size=-1, bits=bits)

    packed = assert_right(folder, tokens)
    assert packed.get_submodule(UP).in_features == 40


def test_groups_that_do_not_fit(quantize: Quantize, tmp_path: Path) -> None:
    with pytest.raises(QuantizeError, match=r"q_proj: group_size 32 does not divide"):
        quantize(unchanged, {"hidden_size": 40})
    assert not (tmp_path / "out").exists()


def test_a_single_sample(quantize: Quantize, tokens: Tensor) -> None:
    fields = {"calibration.num_samples": 1, "calibration.seq_len": 8}

    assert_right(quantize(unchanged, **fields), tokens)


@pytest.mark.parametrize("suffix", ["scales", "outliers"])
def test_a_model_in_float16_that_needs_more(
    quantize: Quantize, tokens: Tensor, suffix: str
) -> None:
    def change(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        if suffix == "scales":
            tensor[1, 1] = 3e4
        else:
            tensor[-1] = (0x4780 << 16) | (int(tensor[-1]) & 0xFFFF)  # 65,536
        return tensor

    folder = quantize(unchanged, **{"outliers.ratio": 0.05})
    rewrite_tensors(folder, replace(f"{UP}.{suffix}", change))

    assert_right(folder, tokens)
    with pytest.raises(FormatError, match=f"{UP}.{suffix}: .* not fit torch.float16"):
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16)
