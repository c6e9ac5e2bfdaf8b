"""The layout of GPTQ checkpoints (AutoGPTQ, GPTQModel).

Codes are packed along the input features, zero-points along the output features, as
streams of fields: of 3 bits 32 fields fill 96 bits. The format `gptq_v2` stores
zero-points as they are, `gptq` what is left when one has been taken off each.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict
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
from tacq_vllm.quantize.errors import QuantizeError

_ONES = {2: 0x55555555, 4: 0x11111111}
"""A one in each field of a word."""


class GptqLayout(BaseModel):
    """What `quantization_config` or quantize_config.json says."""

    model_config = ConfigDict(frozen=True)

    suffixes: ClassVar[tuple[str, ...]] = ("qweight", "qzeros", "scales", "g_idx")

    bits: Bits
    group_size: GroupSize
    sym: bool = False
    checkpoint_format: Literal["gptq", "gptq_v2"] = "gptq"
    is_marlin_format: Literal[False] = False
    pack_dtype: Literal["int32"] = "int32"

    @classmethod
    def parse(cls, block: dict[str, Any]) -> "GptqLayout":
        """Read the block.

        Raises:
            ValidationError: it describes what TaCQ cannot store.
        """
        # GPTQModel 4 and later also call it `format`.
        aliases = {"checkpoint_format": block["format"]} if "format" in block else {}
        return cls.model_validate(aliases | block)

    @property
    def title(self) -> str:
        """What the format is called."""
        return self.checkpoint_format

    def unpack(
        self, tensors: Mapping[str, Tensor], out_features: int, in_features: int
    ) -> SourceLinear:
        """See `SourceLayout`."""
        groups = num_groups(in_features, self.group_size)
        code_words = -(-in_features * self.bits // WORD_BITS)
        zero_words = -(-out_features * self.bits // WORD_BITS)
        expected = {
            "qweight": Expected((code_words, out_features)),
            "qzeros": Expected((groups, zero_words)),
            "scales": Expected((groups, out_features), SCALE_DTYPES),
            "g_idx": Expected((in_features,), is_optional=True),
        }
        check_tensors(tensors, expected)
        check_column_order("g_idx", tensors.get("g_idx"), groups)
        run = 3 if self.bits == 3 else 1
        codes = unpack_fields(tensors["qweight"], self.bits, in_features, 0, run)
        zeros = self._zeros(tensors["qzeros"], out_features, run)
        return SourceLinear(codes.T, zeros.T, tensors["scales"].T)

    def _zeros(self, words: Tensor, out_features: int, run: int) -> Tensor:
        zeros = self._unpack_zeros(words, out_features, run)
        middle = 2 ** (self.bits - 1)
        if not self.sym or bool((zeros == middle).all()):
            return zeros
        # Some writers call `gptq` what they store as `gptq_v2` does.
        stored = unpack_fields(words, self.bits, out_features, 1, run)
        if bool((stored == middle).all()):
            return stored
        raise QuantizeError(
            f"qzeros: not {middle} everywhere, as those of a symmetric (`sym`) "
            "checkpoint are; some versions of GPTQModel wrote those of 3 bits wrongly"
        )

    def _unpack_zeros(self, words: Tensor, out_features: int, run: int) -> Tensor:
        if self.checkpoint_format == "gptq_v2":
            return unpack_fields(words, self.bits, out_features, 1, run)
        if self.bits == 3:
            return (unpack_fields(words, 3, out_features, 1, run) + 1) & 7
        # GPTQModel takes the ones off whole words: a zero-point of 0 borrows from the
        # next, which adding them to the words gives back.
        words = words.to(torch.int64) + _ONES[self.bits]
        return unpack_fields(words, self.bits, out_features, 1)
