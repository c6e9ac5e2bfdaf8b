"""Models that hold their weights in the order of a GPU."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

import tacq_vllm.integrations.transformers  # noqa: F401 - registers the quantizer
from tacq_vllm.config import Recipe
from tacq_vllm.format.checkpoint import WEIGHTS_NAME
from tacq_vllm.format.linear import PackedLinear
from tacq_vllm.format.validation import find_faults
from tacq_vllm.kernels.tiles import TiledLinear
from tacq_vllm.layers import TacqLinear
from tests.arranged import arrange_on_cpu
from tests.conftest import SIZES, open_model, run_pipeline, save_random

WIDE = SIZES | {"hidden_size": 512, "intermediate_size": 512, "num_hidden_layers": 1}


@pytest.fixture(scope="module")
def checkpoint(tiny_recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quantized Llama whose columns are whole blocks."""
    folder = tmp_path_factory.mktemp("wide")
    model = save_random(LlamaConfig(**WIDE), folder / "base")
    base = open_model(model, folder / "work")
    run_pipeline(base, tiny_recipe, folder / "quantized", folder / "work")
    return folder / "quantized"


def load(folder: Path, device: str = "cpu") -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    return model.to(device).eval()


def linears(model: torch.nn.Module) -> list[TacqLinear]:
    return [module for module in model.modules() if isinstance(module, TacqLinear)]


@pytest.fixture(
    params=[
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(
                    not torch.cuda.is_available(), reason="needs an NVIDIA GPU"
                ),
            ],
        ),
    ]
)
def arranged(
    checkpoint: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> PreTrainedModel:
    if request.param == "cpu":
        arrange_on_cpu(monkeypatch)
    model = load(checkpoint, request.param)
    assert len(linears(model)) == 7
    assert all(isinstance(linear.held, TiledLinear) for linear in linears(model))
    return model


def test_the_same_checkpoint_is_saved(
    arranged: PreTrainedModel, checkpoint: Path, tmp_path: Path
) -> None:
    arranged.save_pretrained(tmp_path)

    assert find_faults(tmp_path) == []
    saved, stored = (load_file(f / WEIGHTS_NAME) for f in (tmp_path, checkpoint))
    assert saved.keys() == stored.keys()
    assert all(torch.equal(saved[name], stored[name]) for name in stored)


@torch.no_grad()
def test_logits_are_those_of_the_dequantized_model(
    arranged: PreTrainedModel, checkpoint: Path, tokens: Tensor
) -> None:
    tokens = tokens.to(arranged.device)

    for x in (tokens, tokens[:1, :1]):
        logits = arranged(x).logits.float()
        dense = load(checkpoint).dequantize().to(x.device)(x).logits.float()
        assert (logits - dense).norm() < 0.02 * dense.norm()
    linear, *_ = linears(arranged)
    weight = linear.dequantize(torch.bfloat16)
    arranged.dequantize()
    assert linears(arranged) == []
    first = arranged.get_submodule("model.layers.0.self_attn.q_proj").weight
    assert torch.equal(first, weight)


def test_an_adapter_is_trained(arranged: PreTrainedModel, tokens: Tensor) -> None:
    peft = pytest.importorskip("peft")
    from tacq_vllm.integrations.peft import with_packed_linears

    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"])
    model = peft.get_peft_model(arranged, with_packed_linears(config))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    tokens, values = tokens.to(arranged.device), []
    for _ in range(3):
        loss = model(tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())

    assert values[2] < values[1] < values[0]
    assert all(isinstance(linear.held, TiledLinear) for linear in linears(model))


@torch.no_grad()
def test_autocast_hands_over_float32(arranged: PreTrainedModel, tokens: Tensor) -> None:
    tokens = tokens.to(arranged.device)
    expected = arranged(tokens).logits
    for name, module in arranged.named_modules():
        if "norm" in name or "embed" in name:
            module.float()

    with torch.autocast(arranged.device.type, torch.bfloat16):
        logits = arranged(tokens).logits

    assert (logits.float() - expected.float()).norm() < 0.03 * expected.float().norm()
    assert any(isinstance(linear.held, PackedLinear) for linear in linears(arranged))
