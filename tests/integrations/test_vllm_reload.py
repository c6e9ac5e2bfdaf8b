"""Weights that come into vLLM's linears a second time."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed")

from vllm.config import LoadConfig, VllmConfig, set_current_vllm_config
from vllm.model_executor.layers import linear as vllm_linear
from vllm.model_executor.model_loader.reload import layerwise
from vllm.model_executor.model_loader.weight_utils import (
    initialize_single_dummy_weight,
)

from tacq_vllm.format.stored import StoredLinear
from tacq_vllm.integrations.vllm import linear as linear_method
from tacq_vllm.kernels.reference import dequantize
from tests.integrations.vllm_linears import load, stored_linears

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("one_process")]


def recorded_layer(load_format):
    """A linear as vLLM keeps it for reloading, and what is stored of it."""
    load_config = LoadConfig(load_format=load_format)
    with set_current_vllm_config(VllmConfig(load_config=load_config)):
        config, packed, dense = stored_linears({"down_proj": (64, 512)}, 3, 64)
        layer = vllm_linear.RowParallelLinear(
            512, 64, bias=False, quant_config=config, prefix="down_proj"
        )
        layerwise.record_metadata_for_reloading(layer)
    return layer, packed["down_proj"], dense["down_proj"]


def reload(layer, packed, without=None):
    layerwise.initialize_layerwise_reload(layer)
    for name, tensor in packed.tensors().items():
        if name != without:
            parameter = getattr(layer, name)
            parameter.weight_loader(parameter, tensor)
    model_config = SimpleNamespace(dtype=torch.float32)
    layerwise.finalize_layerwise_reload(layer, model_config)


def test_weights_that_come_after_a_dummy_start():
    layer, packed, dense = recorded_layer("dummy")
    for tensor in layer.state_dict().values():
        initialize_single_dummy_weight(tensor)
    layer.quant_method.process_weights_after_loading(layer)

    reload(layer, packed)

    weight = dequantize(layer.quant_method._packed(layer), torch.float64)
    assert torch.equal(weight, dense)


@pytest.mark.parametrize("name", ["qweight", "scales", "outliers"])
def test_a_tensor_that_is_missing_on_reload(name):
    layer, packed, _ = recorded_layer("auto")
    load(layer, packed, None)
    layer.quant_method.process_weights_after_loading(layer)

    with pytest.raises(Exception, match=f"1 of 1 parts of {name} are missing"):
        reload(layer, packed, without=name)


def test_a_reload_that_takes_other_memory(monkeypatch):
    """As CUDA graphs have the addresses of the first weights."""
    layer, packed, _ = recorded_layer("auto")
    load(layer, packed, None)
    layer.quant_method.process_weights_after_loading(layer)

    def arrange(stored: StoredLinear, x_dtype: torch.dtype) -> StoredLinear:
        return replace(stored, outliers=stored.outliers.repeat(2))

    monkeypatch.setattr(linear_method, "arrange", arrange)
    with pytest.raises(Exception, match="take other memory than those"):
        reload(layer, packed)
