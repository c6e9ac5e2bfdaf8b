"""Whole models loaded as one of several ranks or stages would load them."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from tests.builders import stored_weights
from tests.integrations.conftest import FAMILIES, FamilyCheckpoint

pytest.importorskip("vllm", reason="vLLM is not installed")

from vllm.config import set_current_vllm_config
from vllm.distributed import parallel_state
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.model_loader.utils import (
    initialize_model,
    process_weights_after_loading,
)
from vllm.utils.torch_utils import set_default_torch_dtype

from tacq_vllm.format.checkpoint import read_schema
from tacq_vllm.integrations.vllm.linear import TacqLinearMethod
from tacq_vllm.kernels.reference import dequantize

pytestmark = pytest.mark.vllm


@pytest.fixture
def load_as(monkeypatch):
    """Load a checkpoint in a process that takes itself for one of many."""

    def group(rank: int, size: int) -> SimpleNamespace:
        return SimpleNamespace(
            rank_in_group=rank,
            world_size=size,
            is_first_rank=rank == 0,
            is_last_rank=rank == size - 1,
        )

    def load(folder: Path, rank=0, ranks=1, stage=0, stages=1) -> nn.Module:
        monkeypatch.setattr(parallel_state, "_TP", group(rank, ranks))
        monkeypatch.setattr(parallel_state, "_PP", group(stage, stages))
        monkeypatch.setattr(parallel_state, "_EP", group(0, 1))
        arguments = EngineArgs(
            str(folder), dtype="float32", max_model_len=64, enforce_eager=True
        )
        config = arguments.create_engine_config()
        with set_current_vllm_config(config), set_default_torch_dtype(torch.float32):
            model = initialize_model(config)
            get_model_loader(config.load_config).load_weights(
                model, config.model_config
            )
            process_weights_after_loading(
                model, config.model_config, torch.device("cpu")
            )
        return model

    return load


def loaded_weights(model: nn.Module) -> dict[str, Tensor]:
    """Each (fused) quantized linear of a vLLM model, by name."""
    return {
        name: dequantize(module.quant_method._packed(module), torch.float32)
        for name, module in model.named_modules()
        if isinstance(getattr(module, "quant_method", None), TacqLinearMethod)
    }


def cut(weight: Tensor, index: int, count: int, dim: int = 0) -> Tensor:
    return weight.chunk(count, dim)[index]


def expected_weight(
    name: str, stored: dict[str, Tensor], family: str, rank: int, ranks: int
) -> Tensor:
    """What a rank holds of a linear of vLLM's model, from the whole weights."""
    config = FAMILIES[family]
    parent, _, leaf = name.rpartition(".")
    if leaf in ("o_proj", "down_proj"):
        return cut(stored[name], rank, ranks, dim=1)
    if leaf == "gate_up_proj":
        parts = [stored.get(f"{parent}.{part}_proj") for part in ("gate", "up")]
        if parts[0] is None:
            parts = list(stored[name].chunk(2))
        return torch.cat([cut(part, rank, ranks) for part in parts])
    assert leaf == "qkv_proj"
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    parts = [stored.get(f"{parent}.{part}_proj") for part in "qkv"]
    if parts[0] is None:
        head = stored[name].shape[0] // (heads + 2 * kv_heads)
        parts = list(stored[name].split([heads * head, *[kv_heads * head] * 2]))
    kv_cuts = min(ranks, kv_heads)
    kv_rank = rank * kv_cuts // ranks
    q, k, v = parts
    return torch.cat(
        [cut(q, rank, ranks), cut(k, kv_rank, kv_cuts), cut(v, kv_rank, kv_cuts)]
    )


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma3"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_a_rank_holds_its_slice(
    load_as, family_checkpoint: FamilyCheckpoint, family: str, ranks: int
):
    """With four ranks two share each head of k and v."""
    folder = family_checkpoint(family)
    assert ranks in read_schema(folder).tensor_parallel_sizes
    stored = stored_weights(folder)
    for rank in range(ranks):
        loaded = loaded_weights(load_as(folder, rank, ranks))
        assert len(loaded) == 2 * 4
        for name, weight in loaded.items():
            expected = expected_weight(name, stored, family, rank, ranks)
            assert torch.equal(weight, expected), name


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_a_stage_holds_its_layers_and_misses_no_others(
    load_as, family_checkpoint: FamilyCheckpoint, family: str
):
    folder = family_checkpoint(family)
    stored = stored_weights(folder)
    for stage in range(2):
        loaded = loaded_weights(load_as(folder, stage=stage, stages=2))
        assert len(loaded) == 4
        for name, weight in loaded.items():
            assert name.startswith(f"model.layers.{stage}.")
            assert torch.equal(weight, expected_weight(name, stored, family, 0, 1))
