"""Energy and area of what the arrays do and are made of, in 45 nm.

Sources:

* [H] M. Horowitz, "Computing's energy problem (and what we can do about it)", ISSCC
  2014, figure 1.1.9: 45 nm, 0.9 V. Energies of adders, multipliers, caches, memory.
* [P] J. Hennessy, D. Patterson, "Computer Architecture: A Quantitative Approach", 6th
  edition, figure 1.13: areas of the same units, synthesized for TSMC 45 nm.
* [A] Y. S. Shao and others, "Aladdin", ISCA 2014; `common/power_func.h` of
  github.com/harvard-acc/ALADDIN: registers and bitwise logic of a 40 nm library, at a
  cycle of 1 ns.

Extrapolated, and so ours: an adder costs in proportion to its bits, a multiplier in
proportion to the product of its operands' bits; a clocked register bit costs [A]'s
internal energy and one that changes its switching energy besides. Leakage, clock trees,
wires longer than a neighbour's, control and the decoder of the layout are left out, for
all designs alike.
"""

from dataclasses import dataclass

from tacq_vllm.accelerator.array import Counts
from tacq_vllm.accelerator.design import ACTIVATION_BITS, ArraySize, Design
from tacq_vllm.format.clusters import clustered_words
from tacq_vllm.format.packing import WORD_BITS

ADD_32_PJ = 0.1
"""Integer addition of 32 bits [H]."""
MULTIPLY_8_PJ = 0.2
"""Integer multiplication of 8 by 8 bits [H]."""
CLOCK_BIT_PJ = 7.936518e-3
"""A register bit is clocked: internal energy [A]."""
TOGGLE_BIT_PJ = 1.062977e-3
"""A register bit changes: switching energy [A]."""
BUFFER_BYTE_PJ = 100 / 8
"""A byte of the on-chip buffer: 64 bits of a cache of 1 MB take 100 pJ [H]."""
MEMORY_BYTE_PJ = 1300 / 8
"""A byte of DRAM: 64 bits take 1.3 to 2.6 nJ [H]; the lower end."""

ADD_32_UM2 = 137.0
"""Adder of 32 bits [P]."""
MULTIPLY_8_UM2 = 282.0
"""Multiplier of 8 by 8 bits [P]."""
REGISTER_BIT_UM2 = 5.981433
"""One bit of a register [A]."""
LOGIC_BIT_UM2 = 50.36996 / 32
"""One bit of AND, OR or XOR: 32 bits take 50.4 [A]."""

CODE_BITS = 3
"""Of the longest code that a pulse train is made from."""


@dataclass(frozen=True)
class Traffic:
    """Bytes that a layer moves."""

    buffer_bytes: float
    """Into the array from the on-chip buffer, and back."""
    memory_bytes: float
    """Between the chip and its DRAM."""


def element_area(design: Design) -> float:
    """Area of a processing element, in square micrometres."""
    adder = ADD_32_UM2 * design.accumulator_bits / 32
    registers = REGISTER_BIT_UM2 * design.register_bits
    if design.is_temporal:
        # A pulse lets the activation through, a sign inverts it.
        product = 2 * LOGIC_BIT_UM2 * ACTIVATION_BITS
    else:
        product = MULTIPLY_8_UM2 * design.weight_bits / 8
    return adder + registers + product


def array_area(design: Design, size: ArraySize) -> float:
    """Area of an array, in square micrometres.

    A row of the temporal array has an encoder: a register for the code, and a counter
    and a comparator, both counted as adders.
    """
    encoder = 2 * CODE_BITS * REGISTER_BIT_UM2 + 2 * CODE_BITS * ADD_32_UM2 / 32
    encoders = size.rows * encoder if design.is_temporal else 0.0
    return size.elements * element_area(design) + encoders


def array_energy(counts: Counts, toggles: float, design: Design) -> float:
    """Energy of what an array did, in picojoules."""
    add = ADD_32_PJ * design.accumulator_bits / 32
    multiply = MULTIPLY_8_PJ * design.weight_bits / 8
    return (
        counts.multiplications * multiply
        + counts.additions * add
        + counts.clocked_bits * CLOCK_BIT_PJ
        + toggles * TOGGLE_BIT_PJ
    )


def layer_traffic(
    out_features: int, in_features: int, size: ArraySize, design: Design
) -> Traffic:
    """Bytes that a layer moves for as many tokens as the array has columns.

    Every tile reads its weights and all activations from the buffer and writes sums of
    32 bits; weights and activations come from memory once, outputs of 16 bits go there.
    """
    tiles = -(-out_features // size.rows)
    row_bytes = (
        clustered_words(in_features) * WORD_BITS / 8
        if design.reads_clusters
        else float(in_features)
    )
    weights = out_features * row_bytes
    activations = in_features * size.columns
    outputs = out_features * size.columns
    return Traffic(
        buffer_bytes=weights + tiles * activations + 4 * outputs,
        memory_bytes=weights + activations + 2 * outputs,
    )


def traffic_energy(traffic: Traffic) -> tuple[float, float]:
    """Energy of the buffer's and of the memory's bytes, in picojoules."""
    return (
        traffic.buffer_bytes * BUFFER_BYTE_PJ,
        traffic.memory_bytes * MEMORY_BYTE_PJ,
    )
