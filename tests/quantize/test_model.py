import dataclasses
import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from tacq_vllm.quantize.model import BaseModel
from tests.builders import rewrite_tensors
from tests.conftest import TinyLlama, assert_released, is_equal, open_model


@pytest.fixture
def work(tmp_path: Path) -> Path:
    return tmp_path / "work"


def in_memory(base: BaseModel) -> set[str]:
    """The parameters that have values."""
    parameters = base.model.named_parameters(remove_duplicate=False)
    return {name for name, parameter in parameters if not parameter.is_meta}


def test_opening_reads_no_weights(tiny_base: BaseModel) -> None:
    assert_released(tiny_base)
    assert not tiny_base.model.training
    assert tiny_base.published is tiny_base.weights


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
        assert tiny_base.block_of(name) == int(name.split(".")[2])
    assert list(tiny_base.block_linears(1)) == list(linears)[7:]
    assert tiny_base.unquantized_modules() == {}


def test_the_whole_model_has_the_weights_of_its_files(
    tiny_base: BaseModel, plain_model: LlamaForCausalLM
) -> None:
    with tiny_base.resident() as model:
        assert model is tiny_base.model
        assert is_equal(model.state_dict(), plain_model.state_dict())
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        assert not any(p.requires_grad for p in model.parameters())

    assert_released(tiny_base)


def test_a_block_is_in_memory_alone(
    tiny_base: BaseModel, plain_model: LlamaForCausalLM
) -> None:
    with tiny_base.resident_block(1) as block:
        assert block is tiny_base.blocks[1]
        expected = plain_model.model.layers[1].state_dict()
        assert is_equal(block.state_dict(), expected)
        prefix = tiny_base.block_name(1)
        assert in_memory(tiny_base) == {f"{prefix}.{name}" for name in expected}

    assert_released(tiny_base)


def test_all_but_the_blocks(
    tiny_base: BaseModel, plain_model: LlamaForCausalLM
) -> None:
    with tiny_base.resident_outside():
        names = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
        assert in_memory(tiny_base) == names
        for name in names:
            parameter = tiny_base.model.get_parameter(name)
            assert torch.equal(parameter, plain_model.get_parameter(name))

    assert_released(tiny_base)


def test_a_failure_releases_the_weights(tiny_base: BaseModel) -> None:
    def fail() -> None:
        with tiny_base.resident_block(0):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()

    assert_released(tiny_base)


def test_changed_weights_are_forgotten(tiny_base: BaseModel) -> None:
    name = "model.layers.0.mlp.up_proj"
    before = tiny_base.weight(name)

    with tiny_base.resident_block(0):
        tiny_base.linears()[name].weight.data.zero_()

    assert bool(before.any())
    assert torch.equal(tiny_base.weight(name), before)


def test_tied_embeddings_are_one_parameter(tiny_llama: TinyLlama, work: Path) -> None:
    base = open_model(tiny_llama(tie_word_embeddings=True), work)

    assert "lm_head.weight" not in base.weights
    with base.resident_outside():
        assert base.model.lm_head.weight is base.model.model.embed_tokens.weight
        assert not base.model.lm_head.weight.is_meta

    assert_released(base)


def test_parameters_stay_apart_where_they_are_not_tied(tiny_base: BaseModel) -> None:
    with tiny_base.resident_outside():
        head, embedding = (
            tiny_base.model.get_parameter(name)
            for name in ("lm_head.weight", "model.embed_tokens.weight")
        )
        assert not torch.equal(head, embedding)


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
    base = dataclasses.replace(tiny_base, stored_dtype=stored)

    assert base.storage_dtype(wanted) == storage


def test_the_fingerprint_is_that_of_the_model(model_copy: Path, work: Path) -> None:
    before = open_model(model_copy, work).fingerprint()

    assert open_model(model_copy, work).fingerprint() == before
    path = model_copy / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"rms_norm_eps": 1e-4}))
    other_config = open_model(model_copy, work).fingerprint()
    path.write_text(json.dumps(config))
    rewrite_tensors(model_copy, lambda tensors: None)
    other_weights = open_model(model_copy, work).fingerprint()
    assert len({before, other_config, other_weights}) == 3
