"""Which layout a checkpoint has, and what its linears are stored as."""

import torch

from tacq_vllm.format.clustered import ClusteredLayout
from tacq_vllm.format.linear import PlanesLayout
from tacq_vllm.format.schema import QuantizationSchema, num_groups
from tacq_vllm.format.stored import Layout, TensorSpec


def layout_of(schema: QuantizationSchema) -> Layout:
    """How the codes of a checkpoint's linears are stored."""
    if schema.layout == "clusters":
        return ClusteredLayout()
    return PlanesLayout(schema.bits)


def linear_specs(schema: QuantizationSchema, name: str) -> dict[str, TensorSpec]:
    """Type and shape of every tensor of one linear, by the last part of its name."""
    out_features, in_features = schema.linears[name]
    groups = num_groups(in_features, schema.group_size)
    codes = layout_of(schema).code_specs(out_features, in_features, groups)
    words = out_features + 1 + schema.num_outliers(name)
    return {
        "scales": TensorSpec(schema.torch_dtype, (out_features, groups)),
        **codes,
        "outliers": TensorSpec(torch.int32, (words,)),
    }


def tensor_names(schema: QuantizationSchema) -> tuple[str, ...]:
    """The last parts of the names of a linear's tensors, the same for every linear."""
    return tuple(linear_specs(schema, next(iter(schema.linears))))


def stored_bytes(schema: QuantizationSchema, name: str) -> int:
    """Bytes of all tensors of one linear."""
    return sum(spec.nbytes for spec in linear_specs(schema, name).values())
