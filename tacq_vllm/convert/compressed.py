"""The layout of compressed-tensors checkpoints of the format `pack-quantized`.

Codes are signed and stored with an offset of 2**(bits - 1), packed along the input
features, zero-points along the output features; no field straddles two words. With the
offset left in both, a zero-point is what TaCQ stores; a symmetric one is the offset.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from tacq_vllm.convert.layout import (
    SCALE_DTYPES,
    Bits,
    Expected,
    GroupSize,
    SourceLinear,
    check_column_order,
    check_tensors,
    unpack_fields,
)
from tacq_vllm.format.packing import WORD_BITS
from tacq_vllm.format.schema import num_groups


class _Weights(BaseModel):
    model_config = ConfigDict(frozen=True)

    num_bits: Bits
    type: Literal["int"]
    strategy: Literal["group", "channel"]
    group_size: GroupSize | None = None
    symmetric: bool = True

    @property
    def columns(self) -> int:
        """Input columns that share a scale; -1: the whole row."""
        return (self.group_size or -1) if self.strategy == "group" else -1


class _Scheme(BaseModel):
    weights: _Weights
    input_activations: None = None
    output_activations: None = None


class CompressedLayout(BaseModel):
    """What `quantization_config` says."""

    model_config = ConfigDict(frozen=True)

    suffixes: ClassVar[tuple[str, ...]] = (
        "weight_packed",
        "weight_scale",
        "weight_zero_point",
        "weight_shape",
        "weight_g_idx",
    )
    title: ClassVar[str] = "compressed-tensors pack-quantized"

    format: Literal["pack-quantized"]
    config_groups: dict[str, _Scheme] = Field(min_length=1)
    kv_cache_scheme: None = None
    sparsity_config: dict[str, Any] | None = Field(None, max_length=0)
    transform_config: dict[str, Any] | None = Field(None, max_length=0)

    @model_validator(mode="after")
    def _check_groups(self) -> "CompressedLayout":
        if len({(weights.num_bits, weights.columns) for weights in self._weights}) > 1:
            raise ValueError("config_groups: TaCQ has one num_bits and one group_size")
        return self

    @property
    def bits(self) -> Bits:
        """Bits of a code."""
        return self._weights[0].num_bits

    @property
    def group_size(self) -> int:
        """Input columns that share a scale; -1: the whole row."""
        return self._weights[0].columns

    @property
    def _weights(self) -> list[_Weights]:
        return [scheme.weights for scheme in self.config_groups.values()]

    def unpack(
        self, tensors: Mapping[str, Tensor], out_features: int, in_features: int
    ) -> SourceLinear:
        """See `SourceLayout`."""
        groups = num_groups(in_features, self.group_size)
        fields = WORD_BITS // self.bits
        code_words, zero_words = -(-in_features // fields), -(-out_features // fields)
        is_symmetric = any(weights.symmetric for weights in self._weights)
        expected = {
            "weight_packed": Expected((out_features, code_words)),
            "weight_zero_point": Expected(
                (zero_words, groups), is_optional=is_symmetric
            ),
            "weight_scale": Expected((out_features, groups), SCALE_DTYPES),
            "weight_g_idx": Expected((in_features,), is_optional=True),
        }
        check_tensors(tensors, expected)
        check_column_order("weight_g_idx", tensors.get("weight_g_idx"), groups)
        codes = unpack_fields(tensors["weight_packed"], self.bits, in_features, 1)
        packed = tensors.get("weight_zero_point")
        if packed is None:
            offset = 1 << (self.bits - 1)
            zeros = torch.full((out_features, groups), offset, dtype=torch.uint8)
        else:
            zeros = unpack_fields(packed, self.bits, out_features, 0)
        return SourceLinear(codes, zeros, tensors["weight_scale"])
