"""Models of several families, from their folder to the logits of their checkpoint."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

import tacq_vllm.integrations.transformers  # noqa: F401 - registers the quantizer
from tacq_vllm.config import Recipe
from tacq_vllm.format.checkpoint import WEIGHTS_NAME, read_schema
from tacq_vllm.format.validation import find_faults
from tacq_vllm.layers import TacqLinear
from tacq_vllm.quantize.blocks import BlockCalls
from tests.builders import stored_weights
from tests.conftest import (
    SIZES,
    Recorder,
    assert_released,
    open_model,
    quick,
    run_pipeline,
    save_random,
)

# Phi-3 pads with a token that this vocabulary does not have.
PADDED = SIZES | {"pad_token_id": 0}
DENSE: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**PADDED),
    "llama, tied": LlamaConfig(**PADDED, tie_word_embeddings=True),
    "llama, biased": LlamaConfig(**PADDED, attention_bias=True, mlp_bias=True),
    "mistral": MistralConfig(**PADDED, head_dim=16, sliding_window=8),
    "qwen2": Qwen2Config(**PADDED),
    "qwen3": Qwen3Config(**PADDED, head_dim=32),
    "gemma3": Gemma3TextConfig(
        **PADDED,
        head_dim=16,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "phi3": Phi3Config(**PADDED),
}
EXPERTS: dict[str, PretrainedConfig] = {
    "qwen3_moe": Qwen3MoeConfig(
        **PADDED,
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
    ),
    "mixtral": MixtralConfig(**PADDED, num_local_experts=4, num_experts_per_tok=2),
}
SEPARATE = {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}
FUSED = {"qkv_proj", "gate_up_proj"}


def load(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """A model in float32 that was loaded in a type."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return model.to(torch.float32).eval()


def dequantized(model: Path, checkpoint: Path) -> PreTrainedModel:
    """The base model with the weights that the checkpoint's tensors stand for."""
    dense = load(model, torch.float32)
    for name, weight in stored_weights(checkpoint).items():
        dense.get_submodule(name).weight.data = weight
    return dense


def quantize(
    model: Path, recipe: Recipe, folder: Path, listener: Recorder | None = None
) -> Path:
    base = open_model(model, folder / "work")
    run_pipeline(base, quick(recipe), folder / "out", folder / "work", listener)
    assert_released(base)
    return folder / "out"


def leaves(checkpoint: Path) -> set[str]:
    return {name.split(".")[-1] for name in read_schema(checkpoint).linears}


@pytest.mark.parametrize("family", DENSE | EXPERTS)
@torch.no_grad()
def test_block_by_block_it_is_the_whole_model(
    family: str, tmp_path: Path, tokens: Tensor
) -> None:
    """Each block gets its own mask and its own positions."""
    model = save_random((DENSE | EXPERTS)[family], tmp_path / "model")
    base = open_model(model, tmp_path / "work")
    calls = BlockCalls(base)

    with base.resident_outside():
        hidden = calls.embed(tokens)
    for index in range(len(base.blocks)):
        with base.resident_block(index) as block:
            hidden = calls.run(block, index, hidden)
    with base.resident_outside():
        logits = calls.logits(hidden)

    expected = load(model, torch.float32)(tokens).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert_released(base)


@pytest.mark.parametrize("family", DENSE)
@torch.no_grad()
def test_a_dense_model(
    family: str, tiny_recipe: Recipe, tmp_path: Path, tokens: Tensor
) -> None:
    model = save_random(DENSE[family], tmp_path / "model")
    recorder = Recorder()

    checkpoint = quantize(model, tiny_recipe, tmp_path, recorder)

    assert recorder.notes == []
    assert find_faults(checkpoint) == []
    expected = FUSED if family == "phi3" else SEPARATE
    assert leaves(checkpoint) == expected | {"o_proj", "down_proj"}
    assert len(read_schema(checkpoint).linears) == 2 * (len(expected) + 2)
    packed = load(checkpoint, torch.float32)
    assert any(isinstance(module, TacqLinear) for module in packed.modules())
    logits = packed(tokens).logits
    assert logits.dtype == torch.float32
    dense = dequantized(model, checkpoint)(tokens).logits
    torch.testing.assert_close(logits, dense, rtol=1e-4, atol=1e-4)
    # They are not those of the base model.
    base = load(model, torch.float32)(tokens).logits
    assert float((logits - base).norm()) > 0.01 * float(base.norm())


@pytest.mark.parametrize("family", EXPERTS)
@torch.no_grad()
def test_a_model_of_experts(
    family: str, tiny_recipe: Recipe, tmp_path: Path, tokens: Tensor
) -> None:
    model = save_random(EXPERTS[family], tmp_path / "model")
    recorder = Recorder()

    checkpoint = quantize(model, tiny_recipe, tmp_path, recorder)

    assert find_faults(checkpoint) == []
    assert leaves(checkpoint) == {"q_proj", "k_proj", "v_proj", "o_proj"}
    (note,) = recorder.notes
    assert note.startswith("not quantized: model.layers.0.mlp.experts and 1 more, ")
    assert "stay in 16 bits" in note
    logits = load(checkpoint, torch.float32)(tokens).logits
    assert logits.dtype == torch.float32
    dense = dequantized(model, checkpoint)(tokens).logits
    torch.testing.assert_close(logits, dense, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", EXPERTS)
def test_experts_stay_as_they_are(
    family: str, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    model = save_random(EXPERTS[family], tmp_path / "model")

    checkpoint = quantize(model, tiny_recipe, tmp_path)

    original = load_file(model / WEIGHTS_NAME)
    stored = load_file(checkpoint / WEIGHTS_NAME)
    quantized = {f"{name}.weight" for name in read_schema(checkpoint).linears}
    assert quantized < original.keys()
    kept = original.keys() - quantized
    assert sum("experts" in name for name in kept) == 2 * 4 * 3
    assert all(torch.equal(stored[name], original[name]) for name in kept)
    assert not quantized & stored.keys()
