"""What a method is to a pass over the blocks: it rounds groups of linears."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from tacq_vllm.format.stored import Layout


@dataclass(frozen=True)
class GroupInputs:
    """What a pass has measured of the inputs that a group of linears share."""

    H: Tensor
    """float32 [in, in], the Hessian: the mean outer product over tokens."""
    sample: Tensor
    """float32 [n, in], this process's share of the tokens that the rounder asked for;
    the shares are the same tokens in any number of processes."""


@dataclass(frozen=True)
class RoundedLinear:
    """One linear as a method has quantized it."""

    weight: Tensor
    """float32 [out, in]: what its tensors stand for."""
    tensors: dict[str, Tensor]
    """What the checkpoint holds of it, by the last part of the names."""
    outliers: int
    """Weights kept in 16 bits."""
    stored_bytes: int
    """What all its parts take when they are packed."""
    damp_percent: float | None
    """Damping of the Hessian, of a method that has one."""


class Rounder(Protocol):
    """Quantizes linears that share their input."""

    @property
    def bits(self) -> int:
        """Bits of a code; where they vary, the average."""

    @property
    def group_size(self) -> int:
        """Input columns that share a scale; -1: the whole row."""

    @property
    def layout(self) -> Layout | None:
        """How codes are packed; None: simulated, the tensors are 16-bit weights."""

    @property
    def needs_inputs(self) -> bool:
        """Whether the linears' inputs on the calibration text matter."""

    @property
    def sample_tokens(self) -> int:
        """About how many tokens' inputs it wants beside the Hessian."""

    def round_group(
        self, weights: Mapping[str, Tensor], inputs: GroupInputs | None
    ) -> dict[str, RoundedLinear]:
        """Quantize a group.

        Args:
            weights: float32 [out, in] each, by the full names of the linears.
            inputs: None where they do not matter.

        Raises:
            QuantizeError: a linear cannot be quantized.
        """
