import importlib
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
)

import tacq_vllm.integrations.transformers as integration
from tacq_vllm.config import Recipe, override_recipe
from tacq_vllm.format.checkpoint import WEIGHTS_NAME, read_schema
from tacq_vllm.format.schema import FormatError
from tacq_vllm.format.validation import find_faults
from tacq_vllm.kernels import ops
from tacq_vllm.layers import TacqLinear
from tacq_vllm.quantize.model import BaseModel
from tests.builders import (
    Change,
    put,
    remove,
    replace,
    rewrite_schema,
    rewrite_tensors,
    truncate,
)
from tests.conftest import SIZES, open_model, run_pipeline, save_random

LINEAR = "model.layers.1.self_attn.o_proj"


def load(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


@pytest.fixture(scope="module")
def biased_checkpoint(
    tiny_recipe: Recipe, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A quantized Qwen2, whose attention has biases."""
    folder = tmp_path_factory.mktemp("biased")
    model = save_random(Qwen2Config(**SIZES), folder / "base")
    base = open_model(model, folder / "work")
    run_pipeline(base, tiny_recipe, folder / "quantized", folder / "work")
    return folder / "quantized"


@pytest.fixture(scope="module")
def clustered_checkpoint(
    tiny_base: BaseModel, tiny_recipe: Recipe, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The tiny model in FineQ's layout, weights kept beside it."""
    folder = tmp_path_factory.mktemp("clustered")
    fields = {
        "method": "fineq",
        "bits": 2,
        "group_size": -1,
        "fineq.keep_outliers": True,
    }
    recipe = override_recipe(tiny_recipe, fields)
    run_pipeline(tiny_base, recipe, folder / "clusters", folder / "work")
    return folder / "clusters"


CHECKPOINTS = ["tiny_checkpoint", "biased_checkpoint", "clustered_checkpoint"]


def test_importing_registers() -> None:
    assert AUTO_QUANTIZATION_CONFIG_MAPPING["tacq"] is integration.TacqConfig
    assert AUTO_QUANTIZER_MAPPING["tacq"] is integration.TacqQuantizer


def test_importing_again_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    quantizers, configs = (
        dict(mapping)
        for mapping in (AUTO_QUANTIZER_MAPPING, AUTO_QUANTIZATION_CONFIG_MAPPING)
    )
    monkeypatch.delitem(sys.modules, integration.__name__)

    again = importlib.import_module(integration.__name__)

    assert again is not integration
    assert quantizers == AUTO_QUANTIZER_MAPPING
    assert configs == AUTO_QUANTIZATION_CONFIG_MAPPING


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_linears_are_packed(request: pytest.FixtureRequest, checkpoint: str) -> None:
    folder = request.getfixturevalue(checkpoint)
    model = load(folder, torch.bfloat16)
    stored = load_file(folder / WEIGHTS_NAME)

    for name in read_schema(folder).linears:
        linear = model.get_submodule(name)
        assert isinstance(linear, TacqLinear)
        for suffix, tensor in linear.packed.tensors().items():
            assert torch.equal(tensor, stored[f"{name}.{suffix}"])


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
@torch.no_grad()
def test_logits_are_those_of_the_dequantized_model(
    request: pytest.FixtureRequest, checkpoint: str, tokens: Tensor
) -> None:
    folder = request.getfixturevalue(checkpoint)
    packed, dense = load(folder), load(folder)

    dense = dense.dequantize()

    assert not any(isinstance(module, TacqLinear) for module in dense.modules())
    for x in (tokens, tokens[:1, :1]):
        logits = packed(x).logits
        assert logits.dtype == torch.float32
        torch.testing.assert_close(logits, dense(x).logits, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_logits_are_near_those_of_the_base_model(
    tiny_model: Path, tiny_checkpoint: Path, tokens: Tensor
) -> None:
    expected = load(tiny_model)(tokens).logits

    logits = load(tiny_checkpoint)(tokens).logits

    error = (logits - expected).norm() / expected.norm()
    # A random model of three bits: far from exact, and far from unrelated, which
    # would be a distance of √2.
    assert 0.01 < error < 0.8


def test_the_cache_and_the_prompt_agree(tiny_checkpoint: Path, tokens: Tensor) -> None:
    model = load(tiny_checkpoint)

    text = model.generate(
        tokens[:1], max_new_tokens=6, min_new_tokens=6, do_sample=False
    )

    with torch.no_grad():
        choices = model(text).logits.argmax(-1)
    new = text[0, tokens.shape[1] :]
    # EOS is ruled out while fewer tokens than asked for are written.
    free = new != 2
    assert torch.equal(choices[0, tokens.shape[1] - 1 : -1][free], new[free])


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_saving_gives_the_same_checkpoint(
    request: pytest.FixtureRequest, checkpoint: str, tmp_path: Path, tokens: Tensor
) -> None:
    folder = request.getfixturevalue(checkpoint)
    model = load(folder, torch.bfloat16)

    model.save_pretrained(tmp_path)

    assert find_faults(tmp_path) == []
    assert read_schema(tmp_path) == read_schema(folder)
    first = load_file(folder / WEIGHTS_NAME)
    second = load_file(tmp_path / WEIGHTS_NAME)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    with torch.no_grad():
        logits = load(tmp_path, torch.bfloat16)(tokens).logits
        assert torch.equal(logits, model(tokens).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@torch.no_grad()
def test_converting_a_model_leaves_the_packed_tensors(
    monkeypatch: pytest.MonkeyPatch,
    tiny_checkpoint: Path,
    dtype: torch.dtype,
    tokens: Tensor,
) -> None:
    # Rounded activations would make a small difference a large one.
    monkeypatch.setattr(ops, "_kernels", lambda device_type: None)
    converted = load(tiny_checkpoint, torch.bfloat16).to(dtype)

    assert converted.get_submodule(LINEAR).scales.dtype == torch.bfloat16
    expected = load(tiny_checkpoint, dtype)(tokens).logits
    # Position embeddings are converted too: equal they need not be.
    torch.testing.assert_close(converted(tokens).logits, expected, rtol=1e-2, atol=1e-2)


def test_moving_and_converting_at_once(tiny_checkpoint: Path) -> None:
    linear = load(tiny_checkpoint).get_submodule(LINEAR)

    linear.to("meta", torch.float16)

    assert all(tensor.is_meta for tensor in linear.packed.tensors().values())
    assert linear.scales.dtype == torch.bfloat16


@torch.no_grad()
def test_dequantized_weights_can_be_saved(
    tiny_checkpoint: Path, tmp_path: Path, tokens: Tensor
) -> None:
    model = load(tiny_checkpoint).dequantize()

    model.save_pretrained(tmp_path)

    assert torch.equal(load(tmp_path)(tokens).logits, model(tokens).logits)


def of_tensors(change: Change) -> Callable[[Path], None]:
    return lambda folder: rewrite_tensors(folder, change)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda folder: truncate(folder / WEIGHTS_NAME), "truncated"),
        (
            of_tensors(remove(f"{LINEAR}.scales")),
            f"{LINEAR}.scales: the tensor is missing",
        ),
        (
            of_tensors(replace(f"{LINEAR}.scales", put(3, float("nan")))),
            f"{LINEAR}.scales: a value is not finite",
        ),
        (
            of_tensors(replace(f"{LINEAR}.outliers", put(-1, 64))),
            f"{LINEAR}.outliers: column 64 is outside 64",
        ),
        (
            of_tensors(replace(f"{LINEAR}.outliers", put(1, -7))),
            f"{LINEAR}.outliers: row offsets run",
        ),
        (
            lambda folder: rewrite_schema(folder, format_version=3),
            "format_version 3 is not known",
        ),
        (lambda folder: rewrite_schema(folder, bits=2), "no such tensor"),
        (
            lambda folder: rewrite_schema(
                folder,
                linears={"model.layers.7.up_proj": [64, 64]},
                circuits={"default": {"model.layers.7.up_proj": 0}},
            ),
            "model.layers.7.up_proj",
        ),
    ],
    ids=[
        "truncated",
        "missing",
        "nan",
        "column",
        "offsets",
        "version",
        "bits",
        "linears",
    ],
)
def test_broken_checkpoints_are_refused(
    checkpoint_copy: Path, damage: Callable[[Path], None], reason: str
) -> None:
    damage(checkpoint_copy)

    with pytest.raises(FormatError) as caught:
        load(checkpoint_copy)
    assert reason in str(caught.value)


def test_a_weight_that_the_models_type_cannot_hold(checkpoint_copy: Path) -> None:
    rewrite_tensors(checkpoint_copy, replace(f"{LINEAR}.scales", put(3, 6e4)))

    with pytest.raises(
        FormatError, match=rf"{LINEAR}.scales: 7 times a value does not"
    ):
        load(checkpoint_copy, torch.float16)


def test_a_module_of_another_shape_is_refused(checkpoint_copy: Path) -> None:
    config = checkpoint_copy / "config.json"
    config.write_text(
        config.read_text().replace(
            '"intermediate_size": 128', '"intermediate_size": 96'
        )
    )

    with pytest.raises(FormatError, match=r"mlp\.\S+: stored as .* but the model has"):
        load(checkpoint_copy)
