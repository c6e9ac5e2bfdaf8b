"""A systolic array, register by register and cycle by cycle.

Outputs stay: the element in row r and column c sums the products of output channel r
and token c. Weights enter at the left and move right, activations enter at the top and
move down, each row and column one cycle later than the one before, so that partners
meet. An array of multiply-accumulate units (MACs) takes a weight and an activation in
every cycle. In the temporal array an activation stays while its weights' pulses pass:
as many cycles (slots) as the largest magnitude in that column of the tile, none if all
its weights are zero; an element adds or subtracts the activation once per pulse. At the
end the sums leave through the accumulators, a row per cycle.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tacq_vllm.accelerator.design import (
    ACTIVATION_BITS,
    FLAG_BITS,
    ArraySize,
    Design,
)

Integers = NDArray[np.integer]

_ONES = np.array([value.bit_count() for value in range(1 << 16)], dtype=np.uint8)


@dataclass(frozen=True)
class Streams:
    """What enters an array, slot by slot, before rows and columns are delayed."""

    weights: Integers
    """[rows, slots]: weights, or pulses -1, 0 and 1."""
    activations: Integers
    """[columns, slots]."""
    is_new: NDArray[np.bool_]
    """[slots]: an activation begins."""


@dataclass(frozen=True)
class Counts:
    """What an array did."""

    cycles: float
    multiplications: float
    additions: float
    clocked_bits: float
    """Register bits that were clocked, summed over cycles."""

    def scaled(self, factor: float) -> "Counts":
        """The same work `factor` times."""
        return Counts(
            self.cycles * factor,
            self.multiplications * factor,
            self.additions * factor,
            self.clocked_bits * factor,
        )


@dataclass(frozen=True)
class TileRun:
    """Outputs and work of one simulated tile."""

    outputs: Integers
    """int64 [rows, columns], as they left the array."""
    counts: Counts
    toggles: int
    """Register bits that changed."""


def make_streams(codes: Integers, activations: Integers, design: Design) -> Streams:
    """Lay out what enters at the edges of the array.

    Args:
        codes: [rows, k].
        activations: [k, columns].
        design: says whether codes become pulse trains.
    """
    if not design.is_temporal:
        is_new = np.ones(codes.shape[1], dtype=np.bool_)
        return Streams(codes, activations.T, is_new)
    lengths = step_lengths(codes)
    steps = np.repeat(np.arange(len(lengths)), lengths)
    starts = np.cumsum(lengths) - lengths
    ages = np.arange(len(steps)) - starts[steps]
    pulses = np.where(np.abs(codes[:, steps]) > ages, np.sign(codes[:, steps]), 0)
    return Streams(pulses, activations[steps].T, ages == 0)


def step_lengths(codes: Integers) -> NDArray[np.int64]:
    """Slots of each column of a tile [rows, k] in the temporal array: [k]."""
    lengths: NDArray[np.int64] = np.abs(codes.astype(np.int64)).max(axis=0)
    return lengths


def count_tile(codes: Integers, columns: int, design: Design) -> Counts:
    """Count what the array does for a tile, without simulating it.

    Args:
        codes: [rows, k], rows as many as the array has.
        columns: of the array.
        design: of its elements.
    """
    rows, length = codes.shape
    elements = rows * columns
    if design.is_temporal:
        lengths = step_lengths(codes)
        slots, steps = int(lengths.sum()), int((lengths > 0).sum())
        additions = int(np.abs(codes.astype(np.int64)).sum()) * columns
    else:
        slots = steps = length
        additions = elements * length
    computing = slots + rows + columns - 1
    always = (FLAG_BITS + design.weight_bits) * elements * computing
    loads = ACTIVATION_BITS * elements * steps
    sums = design.accumulator_bits * (additions + elements * rows)
    return Counts(
        cycles=computing + rows,
        multiplications=0 if design.is_temporal else additions,
        additions=additions,
        clocked_bits=always + loads + sums,
    )


def run_tile(codes: Integers, activations: Integers, design: Design) -> TileRun:
    """Simulate the array on one tile, register by register.

    Flags and weights are clocked in every cycle; activations only where a new one
    arrives, accumulators only where something is added.

    Args:
        codes: [rows, k].
        activations: [k, columns], of 8 bits.
        design: of the elements.
    """
    size = ArraySize(codes.shape[0], activations.shape[1])
    shape = (size.rows, size.columns)
    streams = make_streams(codes, activations, design)
    slots = len(streams.is_new)
    computing = slots + size.rows + size.columns - 1
    left = _delayed(streams.weights, computing)
    top = _delayed(streams.activations, computing)
    news = np.broadcast_to(streams.is_new, (size.columns, slots))
    top_news = _delayed(news.astype(np.int32), computing).astype(np.bool_)

    weights = np.zeros(shape, np.int32)
    held = np.zeros(shape, np.int32)
    is_new = np.zeros(shape, np.bool_)
    sums = np.zeros(shape, np.int32)
    cycles = additions = clocked_bits = toggles = 0
    for cycle in range(computing):
        adds = weights != 0 if design.is_temporal else is_new
        # Of a pulse this product is the activation, its opposite, or nothing.
        next_sums = np.where(adds, sums + weights * held, sums)
        next_weights = np.column_stack([left[:, cycle], weights[:, :-1]])
        next_is_new = np.vstack([top_news[:, cycle], is_new[:-1]])
        arriving = np.vstack([top[:, cycle], held[:-1]])
        next_held = np.where(next_is_new, arriving, held)
        cycles += 1
        additions += int(adds.sum())
        clocked_bits += (
            (FLAG_BITS + design.weight_bits) * size.elements
            + ACTIVATION_BITS * int(next_is_new.sum())
            + design.accumulator_bits * int(adds.sum())
        )
        toggles += (
            _flips(sums, next_sums, design.accumulator_bits)
            + _flips(weights, next_weights, design.weight_bits)
            + _flips(held, next_held, ACTIVATION_BITS)
            + int((is_new != next_is_new).sum())
        )
        sums, weights, held, is_new = next_sums, next_weights, next_held, next_is_new

    outputs = np.zeros(shape, np.int64)
    for row in reversed(range(size.rows)):
        outputs[row] = sums[-1]
        moved = np.vstack([np.zeros_like(sums[:1]), sums[:-1]])
        cycles += 1
        clocked_bits += design.accumulator_bits * size.elements
        toggles += _flips(sums, moved, design.accumulator_bits)
        sums = moved

    multiplications = 0 if design.is_temporal else additions
    counts = Counts(cycles, multiplications, additions, clocked_bits)
    return TileRun(outputs, counts, toggles)


def _delayed(streams: Integers, cycles: int) -> NDArray[np.int32]:
    """Delay stream i by i cycles; nothing, 0, comes before and after."""
    delayed = np.zeros((streams.shape[0], cycles), np.int32)
    for index, stream in enumerate(streams):
        delayed[index, index : index + len(stream)] = stream
    return delayed


def _flips(before: NDArray[np.int32], after: NDArray[np.int32], bits: int) -> int:
    """Bits that differ among the lowest `bits` of each number."""
    changed = (before ^ after) & np.int32((1 << bits) - 1 if bits < 32 else -1)
    return int(_ONES[changed.view(np.uint16)].sum())
