"""The arrays that are compared: what their processing elements are made of."""

from dataclasses import dataclass

ACTIVATION_BITS = 8
"""Activations are integers of 8 bits, as on the other 8-bit paths of this package."""

FLAG_BITS = 1
"""The bit that moves with an activation and says that it is a new one."""

PULSE_BITS = 2
"""A pulse, and whether it subtracts."""


@dataclass(frozen=True)
class ArraySize:
    """Processing elements of an array: one output channel a row, one token a column."""

    rows: int
    columns: int

    @property
    def elements(self) -> int:
        """Their number."""
        return self.rows * self.columns


@dataclass(frozen=True)
class Design:
    """A kind of processing element; its registers' widths are in bits."""

    name: str
    is_temporal: bool
    """The weight comes as a pulse train: an adder, and no multiplier."""
    weight_bits: int
    """Of the register that a weight, or a pulse, moves on through."""
    accumulator_bits: int
    reads_clusters: bool
    """Weights are read from memory in FineQ's layout, else as 8-bit integers."""

    @property
    def register_bits(self) -> int:
        """Bits of all registers of one element."""
        moving = ACTIVATION_BITS + FLAG_BITS + self.weight_bits
        return moving + self.accumulator_bits


# Accumulators hold any row of 14,336 weights (Llama-3-8B's longest): products of 8 by 8
# bits need 29 bits, those of 8 bits by -4 to 3 need 24.
TEMPORAL = Design("temporal", True, PULSE_BITS, 24, reads_clusters=True)
MAC_8 = Design("MAC, 8 x 8 bits", False, 8, 32, reads_clusters=False)
MAC_3 = Design("MAC, 8 x 3 bits", False, 3, 24, reads_clusters=True)

DESIGNS = (MAC_8, MAC_3, TEMPORAL)
