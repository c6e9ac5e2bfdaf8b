"""What people do with a model once Transformers has loaded it."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    pipeline,
)

import tacq_vllm.integrations.transformers  # noqa: F401 - registers the quantizer
from tacq_vllm.format.checkpoint import CONFIG_NAME, INDEX_NAME
from tacq_vllm.format.json_object import read_json
from tacq_vllm.format.validation import find_faults
from tacq_vllm.kernels import ops
from tacq_vllm.layers import TacqLinear
from tests.integrations.conftest import FamilyCheckpoint

TEXT = "the old river follows"


def load(folder: Path, **options: object) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def stored_tensors(folder: Path) -> dict[str, Tensor]:
    return {
        name: tensor
        for path in folder.glob("*.safetensors")
        for name, tensor in load_file(path).items()
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@torch.no_grad()
def test_dtype(tiny_checkpoint: Path, tokens: Tensor, dtype: torch.dtype) -> None:
    model = load(tiny_checkpoint, dtype=dtype)

    assert model.dtype == dtype
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    logits = model(tokens).logits
    assert logits.dtype == dtype
    expected = load(tiny_checkpoint, dtype=torch.float32)(tokens).logits
    error = (logits.float() - expected).norm() / expected.norm()
    assert error < 0.05


def test_dtype_of_experts(
    monkeypatch: pytest.MonkeyPatch, family_checkpoint: FamilyCheckpoint
) -> None:
    """Which Transformers puts together while it loads."""
    monkeypatch.setattr(ops, "_kernels", lambda device_type: None)

    model = load(family_checkpoint("mixtral"), dtype=torch.float32)

    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_dtype_is_the_stored_one_by_default(tiny_checkpoint: Path) -> None:
    assert load(tiny_checkpoint).dtype == torch.bfloat16


@torch.no_grad()
def test_device_map(tiny_checkpoint: Path, tokens: Tensor) -> None:
    pytest.importorskip("accelerate")

    model = load(tiny_checkpoint, device_map="auto")

    assert any(isinstance(module, TacqLinear) for module in model.modules())
    device = next(model.parameters()).device
    expected = load(tiny_checkpoint).to(device)(tokens.to(device)).logits
    assert torch.equal(model(tokens.to(device)).logits, expected)


def test_shards_are_saved_equal_and_load_again(
    tiny_checkpoint: Path, tmp_path: Path, tokens: Tensor
) -> None:
    model = load(tiny_checkpoint)

    model.save_pretrained(tmp_path / "first", max_shard_size="40KB")
    again = load(tmp_path / "first")
    again.save_pretrained(tmp_path / "second")

    assert (tmp_path / "first" / INDEX_NAME).is_file()
    original = stored_tensors(tiny_checkpoint)
    for folder in (tmp_path / "first", tmp_path / "second"):
        assert find_faults(folder) == []
        saved = stored_tensors(folder)
        assert saved.keys() == original.keys()
        assert all(torch.equal(saved[name], original[name]) for name in saved)
        block, expected = (
            read_json(path / CONFIG_NAME)["quantization_config"]
            for path in (folder, tiny_checkpoint)
        )
        assert block == expected
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, model(tokens).logits)


def test_generation_is_that_of_the_dequantized_model(tiny_checkpoint: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    inputs = tokenizer(TEXT, return_tensors="pt", return_token_type_ids=False)
    options = {"max_new_tokens": 12, "do_sample": False}
    model = load(tiny_checkpoint, dtype=torch.float32)

    text = model.generate(**inputs, **options)

    dense = load(tiny_checkpoint, dtype=torch.float32).dequantize()
    assert text.shape[1] > inputs.input_ids.shape[1]
    assert torch.equal(text, dense.generate(**inputs, **options))


def test_pipeline(tiny_checkpoint: Path) -> None:
    options = {"max_new_tokens": 5, "do_sample": False}
    model = load(tiny_checkpoint, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)

    write = pipeline("text-generation", model=model, tokenizer=tokenizer)
    by_name = pipeline(
        "text-generation", model=str(tiny_checkpoint), dtype=torch.float32
    )

    (answer,) = write(TEXT, **options)
    assert answer["generated_text"].startswith(TEXT)
    assert len(answer["generated_text"]) > len(TEXT)
    assert by_name(TEXT, **options) == [answer]


def test_one_import_registers_however_often(tiny_checkpoint: Path) -> None:
    script = f"""
import importlib, sys
import torch
import tacq_vllm.integrations.transformers as integration
from transformers import AutoModelForCausalLM

importlib.reload(integration)
integration.register()
# Kernels for float32 take less time to compile.
model = AutoModelForCausalLM.from_pretrained(
    {str(tiny_checkpoint)!r}, dtype=torch.float32
)
assert model.is_quantized
assert "vllm" not in sys.modules
assert type(model.model.layers[0].mlp.up_proj).__name__ == "TacqLinear"
"""

    subprocess.run([sys.executable, "-c", script], check=True)
