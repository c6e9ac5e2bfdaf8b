import shutil
from pathlib import Path

import pytest
import torch

from tacq_vllm.quantize.errors import QuantizeError
from tacq_vllm.quantize.model import BaseModel, load_base_model
from tests.builders import truncate
from tests.conftest import TinyLlama

CPU = torch.device("cpu")


@pytest.fixture
def model_copy(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "tiny-1.7B"))


def test_loads_in_float32_and_knows_the_stored_type(tiny_base: BaseModel) -> None:
    assert tiny_base.model.dtype == torch.float32
    assert tiny_base.stored_dtype == torch.bfloat16
    assert not tiny_base.model.training
    assert not any(p.requires_grad for p in tiny_base.model.parameters())


def test_linears_are_those_of_attention_and_mlp(tiny_base: BaseModel) -> None:
    linears = tiny_base.linears()

    assert len(linears) == 14
    assert list(linears)[:2] == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.self_attn.k_proj",
    ]
    assert "lm_head" not in linears
    for name, linear in linears.items():
        assert tiny_base.model.get_submodule(name) is linear


@pytest.mark.parametrize(
    ("stored", "wanted", "storage"),
    [
        (torch.float32, "auto", "bfloat16"),
        (torch.bfloat16, "auto", "bfloat16"),
        (torch.float16, "auto", "float16"),
        (torch.float16, "bfloat16", "bfloat16"),
        (torch.bfloat16, "float16", "float16"),
    ],
)
def test_storage_dtype(
    tiny_base: BaseModel, stored: torch.dtype, wanted: str, storage: str
) -> None:
    base = BaseModel("x", tiny_base.model, tiny_base.tokenizer, stored)

    assert base.storage_dtype(wanted) == storage


def test_float16_models_are_told_apart(tiny_llama: TinyLlama) -> None:
    base = load_base_model(str(tiny_llama(torch.float16)), CPU)

    assert base.stored_dtype == torch.float16


def test_the_name_is_the_whole_name_of_the_folder(model_copy: Path) -> None:
    assert load_base_model(str(model_copy), CPU).name == "tiny-1.7B"


def test_missing_gguf(tmp_path: Path) -> None:
    with pytest.raises(QuantizeError, match=r"model\.gguf: no such file"):
        load_base_model(str(tmp_path / "model.gguf"), CPU)


def test_file_that_is_not_gguf(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"no")

    with pytest.raises(QuantizeError, match=r"model\.gguf: cannot be loaded"):
        load_base_model(str(tmp_path / "model.gguf"), CPU)


def test_folder_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(QuantizeError, match="nowhere: cannot be loaded"):
        load_base_model(str(tmp_path / "nowhere"), CPU)


def test_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(QuantizeError, match=r"the folder has no config\.json"):
        load_base_model(str(tmp_path), CPU)


def test_truncated_model(model_copy: Path) -> None:
    truncate(model_copy / "model.safetensors")

    with pytest.raises(QuantizeError, match="cannot be loaded") as caught:
        load_base_model(str(model_copy), CPU)
    assert "\n" not in str(caught.value)


def test_model_without_a_tokenizer(model_copy: Path) -> None:
    for path in model_copy.glob("tokenizer*"):
        path.unlink()

    with pytest.raises(QuantizeError, match="cannot be loaded"):
        load_base_model(str(model_copy), CPU)


def test_quantized_model(tiny_checkpoint: Path) -> None:
    with pytest.raises(QuantizeError, match="already quantized"):
        load_base_model(str(tiny_checkpoint), CPU)
