"""What the layouts of other formats have in common: codes, zero-points, scales."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from pydantic import PositiveInt
from torch import Tensor
from torch.nn.functional import pad

from tacq_vllm.format.packing import WORD_BITS
from tacq_vllm.quantize.errors import QuantizeError

Bits = Literal[2, 3, 4]
GroupSize = Literal[-1] | PositiveInt
SCALE_DTYPES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class SourceLinear:
    """A quantized linear, W = (code - zero) · scale, however it was stored."""

    codes: Tensor
    """uint8 [out, in]."""
    zeros: Tensor
    """uint8 [out, groups], in the range of the codes."""
    scales: Tensor
    """16-bit [out, groups]."""

    @property
    def zeros_of_codes(self) -> Tensor:
        """The zero-point of each code: uint8 [out, in]."""
        group_size = self.codes.shape[1] // self.zeros.shape[1]
        return self.zeros.repeat_interleave(group_size, dim=1)

    def dequantize(self) -> Tensor:
        """The dense weight: float32 [out, in]."""
        steps = self.codes.to(torch.float32) - self.zeros_of_codes
        steps.view(*self.zeros.shape, -1).mul_(self.scales.unsqueeze(-1))
        return steps


class SourceLayout(Protocol):
    """How a format stores quantized linears."""

    @property
    def title(self) -> str:
        """What the format is called."""

    @property
    def bits(self) -> Bits:
        """Bits of a code."""

    @property
    def group_size(self) -> int:
        """Input columns that share a scale; -1: the whole row."""

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Last parts of its tensors' names; the first one marks a quantized linear."""

    def unpack(
        self, tensors: Mapping[str, Tensor], out_features: int, in_features: int
    ) -> SourceLinear:
        """Read a linear from its tensors, by the last part of their names.

        Raises:
            QuantizeError: a tensor is missing or misshapen, or TaCQ cannot store what
                it says; the message begins with the last part of its name.
        """


def unpack_fields(
    words: Tensor, bits: int, length: int, dim: int, run: int = 1
) -> Tensor:
    """Unpack fields of `bits` bits.

    Args:
        words: int32 [..., n, ...] with n at `dim`, the first field in the lowest bits.
        bits: width of a field.
        length: number of fields.
        dim: the axis along which they are packed.
        run: words that are filled together. Within a run fields straddle words; bits
            at its end that hold no whole field are left over.

    Returns:
        uint8 [..., length, ...] with `length` at `dim`.
    """
    words = words.movedim(dim, -1).to(torch.int64) & 0xFFFFFFFF
    words = pad(words, (0, -words.shape[-1] % run + 1))
    # A field that begins in a word ends in the next one at the latest.
    pairs = words[..., :-1] | (words[..., 1:] << WORD_BITS)
    per_run = run * WORD_BITS // bits
    fields = torch.empty(
        *pairs.shape[:-1], pairs.shape[-1] // run * per_run, dtype=torch.uint8
    )
    for index in range(per_run):
        word, shift = divmod(index * bits, WORD_BITS)
        fields[..., index::per_run] = (pairs[..., word::run] >> shift) & (
            (1 << bits) - 1
        )
    return fields[..., :length].movedim(-1, dim)


@dataclass(frozen=True)
class Expected:
    """What a tensor must be."""

    shape: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...] = (torch.int32,)
    is_optional: bool = False


def check_tensors(
    tensors: Mapping[str, Tensor], expected: Mapping[str, Expected]
) -> None:
    """Refuse tensors of other types or shapes.

    Raises:
        QuantizeError: naming the tensor, and what it is.
    """
    for name, wanted in expected.items():
        tensor = tensors.get(name)
        if tensor is None:
            if wanted.is_optional:
                continue
            raise QuantizeError(f"{name}: the tensor is missing")
        if tensor.dtype not in wanted.dtypes or tensor.shape != wanted.shape:
            dtypes = " or ".join(str(dtype) for dtype in wanted.dtypes)
            raise QuantizeError(
                f"{name}: is {tensor.dtype} {list(tensor.shape)}, not {dtypes} "
                f"{list(wanted.shape)}"
            )


def check_column_order(name: str, groups: Tensor | None, num_groups: int) -> None:
    """Refuse columns that are not grouped in the order in which they are stored.

    Args:
        name: of the tensor.
        groups: int32 [in], the group of each column; None: in order.
        num_groups: number of groups.

    Raises:
        QuantizeError: naming the tensor.
    """
    if groups is None:
        return
    ordered = torch.arange(len(groups)) // (len(groups) // num_groups)
    if not torch.equal(groups.long(), ordered):
        raise QuantizeError(
            f"{name}: columns are grouped in activation order (desc_act, actorder "
            "'group'), which TaCQ cannot store; quantize without it"
        )
