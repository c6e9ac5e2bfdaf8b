"""Weights that vLLM holds in another order than they are stored in."""

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed")

from torch import nn
from vllm.model_executor.layers import linear as vllm_linear

from tacq_vllm.format.stored import StoredLinear
from tacq_vllm.integrations.vllm import linear as linear_method
from tacq_vllm.integrations.vllm import summary
from tacq_vllm.kernels.tiles import ROWS, TiledLinear
from tacq_vllm.kernels.tiling import tile
from tests.integrations.vllm_linears import load, stored_linears

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("one_process")]


@pytest.mark.parametrize("bits", [2, 3])
def test_weights_may_be_held_in_another_order(monkeypatch, bits):
    def arrange(packed: StoredLinear, x_dtype: torch.dtype) -> TiledLinear:
        return tile(packed)

    monkeypatch.setattr(linear_method, "arrange", arrange)
    monkeypatch.setattr(linear_method, "prepare", lambda *arguments: None)
    monkeypatch.setattr(summary, "kernel_name", lambda linear, x_dtype: "triton")
    config, packed, _ = stored_linears(
        {"mlp.gate_proj": (128, 512), "mlp.up_proj": (128, 512)}, bits, 64
    )
    layer = vllm_linear.MergedColumnParallelLinear(
        512, [128, 128], bias=False, quant_config=config, prefix="mlp.gate_up_proj"
    )
    load(layer, packed["mlp.gate_proj"], 0)
    load(layer, packed["mlp.up_proj"], 1)
    method = layer.quant_method

    method.process_weights_after_loading(layer)

    held = dict(layer.named_parameters())
    assert "scales" not in held
    assert "outliers" not in held
    stacked = [packed[name].scales for name in ("mlp.gate_proj", "mlp.up_proj")]
    scales = held["grid"].bitwise_right_shift(16).to(torch.int16)
    expected = torch.cat(stacked).view(torch.int16).view(-1, 2, ROWS // 2, 512 // 64)
    assert torch.equal(scales, expected.permute(0, 3, 2, 1))
    assert held["segment_starts"].numel() == 17
    method.process_weights_after_loading(layer)
    with torch.device("meta"):
        for name, tensor in held.items():
            setattr(layer, name, nn.Parameter(tensor.to("meta"), False))
        x = torch.empty(3, 512, dtype=torch.bfloat16)
        assert method.apply(layer, x).shape == (3, 256)
