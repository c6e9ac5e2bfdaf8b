"""Linears as checkpoints store them, and what loads them into vLLM's."""

from functools import partial

import torch
from torch import nn
from vllm.model_executor.layers import linear as vllm_linear

from tacq_vllm.format.schema import QuantizationSchema
from tacq_vllm.format.stored import StoredLinear
from tacq_vllm.integrations.vllm.config import TacqConfig
from tests.builders import random_linear
from tests.clusters import random_clustered

CLUSTERS = "clusters"
GATE_UP = {"mlp.gate_proj": (128, 64), "mlp.up_proj": (128, 64)}


def stored_linears(
    shapes: dict[str, tuple[int, int]], bits: int | str, group_size: int
) -> tuple[TacqConfig, dict[str, StoredLinear], dict[str, torch.Tensor]]:
    packed, dense = {}, {}
    make, fields = partial(random_linear, bits), {"bits": bits}
    if bits == CLUSTERS:
        make = random_clustered
        fields = {"bits": 2, "layout": CLUSTERS, "format_version": 2}
    for seed, (name, (out, in_)) in enumerate(shapes.items()):
        packed[name], dense[name] = make(
            out, in_, group_size, 0.02, torch.bfloat16, seed
        )
    schema = QuantizationSchema(
        **fields,
        group_size=group_size,
        dtype="bfloat16",
        linears=shapes,
        circuits={
            "default": {
                name: p.outliers.numel() - p.out_features - 1
                for name, p in packed.items()
            }
        },
    )
    config = TacqConfig(schema)
    config.packed_modules_mapping = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }
    return config, packed, dense


def load(
    layer: nn.Module, packed: StoredLinear, shard_id: str | int | tuple | None
) -> None:
    for name, tensor in packed.tensors().items():
        parameter = getattr(layer, name)
        if shard_id is None:
            parameter.weight_loader(parameter, tensor)
        else:
            parameter.weight_loader(parameter, tensor, shard_id)


def merged_layer(config: TacqConfig, parent: str = "mlp") -> nn.Module:
    """A module of the linears in `GATE_UP`, without values."""
    return vllm_linear.MergedColumnParallelLinear(
        64, [128, 128], bias=False, quant_config=config, prefix=f"{parent}.gate_up_proj"
    )
