"""Pieces of LLVM code that the CPU kernels share, and the sharing of rows."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numba
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 16
"""Lanes of a vector of 32-bit values."""

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
F32 = ir.FloatType()
WORDS = ir.VectorType(I32, LANES)
FLOATS = ir.VectorType(F32, LANES)


@dataclass(frozen=True)
class Team:
    """C functions that tell a thread its place in a parallel region."""

    thread_number: Callable[[], int]
    num_threads: Callable[[], int]


def row_sharer(team: Team, arguments: tuple[str, ...]) -> Any:
    """Compile the calling thread's part of the rows `first_row` to before `last_row`.

    Args:
        team: where the calling thread is.
        arguments: what the kernel is given, these two among them.
    """
    first, last = arguments.index("first_row"), arguments.index("last_row")
    thread_number, num_threads = team.thread_number, team.num_threads

    @numba.njit(inline="always")
    def share(a):
        size = (a[last] - a[first] + num_threads() - 1) // num_threads()
        start = a[first] + thread_number() * size
        return start, min(start + size, a[last])

    return share


def at(builder: Any, base: Any, index: Any, kind: Any) -> Any:
    """Load element `index` of an array of `kind` at the address `base`."""
    lanes = getattr(kind, "count", 1)
    width = getattr(kind, "element", kind)
    size = {I8: 1, I16: 2, I32: 4, F32: 4}[width] * lanes
    address = builder.add(base, builder.mul(index, I64(size)))
    return builder.load(builder.inttoptr(address, kind.as_pointer()), align=1)


def put(builder: Any, base: Any, value: Any) -> None:
    """Store a value of any type at the address `base`."""
    pointer = builder.inttoptr(base, value.type.as_pointer())
    builder.store(value, pointer, align=1)


def load_some(builder: Any, base: Any, kind: Any, valid: Any) -> Any:
    """Load the first `valid` lanes of a vector at an address; the others are zero."""
    order = ir.VectorType(I32, kind.count)
    numbers = ir.Constant(order, list(range(kind.count)))
    bound = splat(builder, builder.trunc(valid, I32), order)
    mask = builder.icmp_unsigned("<", numbers, bound)
    pointer = builder.inttoptr(base, kind.as_pointer())
    name = f"llvm.masked.load.v{kind.count}{kind.element}.p0"
    arguments = [pointer, I32(1), mask, same(kind, 0)]
    return call(builder, name, kind, arguments)


def prefetch(builder: Any, address: Any) -> None:
    """Ask for the line of memory at an address, which need not exist."""
    pointer = builder.inttoptr(address, I8.as_pointer())
    kind = ir.FunctionType(ir.VoidType(), [pointer.type, I32, I32, I32])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    read, everywhere, data = I32(0), I32(3), I32(1)
    builder.call(function, [pointer, read, everywhere, data])


def call(builder: Any, name: str, result: Any, arguments: list[Any]) -> Any:
    """Call one of LLVM's own functions."""
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    function = cgutils.get_or_insert_function(builder.module, kind, name)
    return builder.call(function, arguments)


def same(kind: Any, number: int) -> Any:
    """A constant, in all lanes if the type is a vector."""
    if isinstance(kind, ir.VectorType):
        return ir.Constant(kind, [number] * kind.count)
    return kind(number)


def splat(builder: Any, value: Any, kind: Any) -> Any:
    """A scalar in all lanes of a vector."""
    undefined = ir.Constant(kind, ir.Undefined)
    single = builder.insert_element(undefined, value, I32(0))
    return pick(builder, single, [0] * kind.count)


def pick(builder: Any, vector: Any, lanes: list[int]) -> Any:
    """The named lanes of a vector, as a vector."""
    order = ir.Constant(ir.VectorType(I32, len(lanes)), lanes)
    return builder.shuffle_vector(vector, vector, order)


def zeroed(builder: Any) -> Any:
    """A vector of sums on the stack, which the compiler keeps in a register."""
    slot = cgutils.alloca_once(builder, FLOATS)
    builder.store(same(FLOATS, 0), slot)
    return slot


def multiply_add(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """The sum a · b + c, of floats or in each lane."""
    is_vector = isinstance(a.type, ir.VectorType)
    kind = f"v{a.type.count}f32" if is_vector else "f32"
    return call(builder, f"llvm.fmuladd.{kind}", a.type, [a, b, c])


def add_product(builder: Any, slot: Any, a: Any, b: Any) -> None:
    """Add a · b to a vector of sums."""
    builder.store(multiply_add(builder, a, b, builder.load(slot)), slot)


def sum_slots(builder: Any, places: list[Any], first: Any) -> list[Any]:
    """Vectors of sums in registers: from memory, or zero where `first` is zero."""
    slots = [zeroed(builder) for _ in places]
    with builder.if_then(builder.icmp_unsigned("!=", first, I64(0))):
        for place, slot in zip(places, slots, strict=True):
            builder.store(at(builder, place, I64(0), FLOATS), slot)
    return slots


def lane_sums(builder: Any, vectors: list[Any]) -> Any:
    """The sum of the lanes of each of 1, 2, 4, 8 or 16 vectors, as one vector.

    Neighbours are added first, whatever the number of vectors.
    """
    count = len(vectors)
    while len(vectors) > 1:
        pairs = zip(vectors[::2], vectors[1::2], strict=True)
        vectors = [_neighbour_sums(builder, *pair) for pair in pairs]
    (vector,) = vectors
    while vector.type.count > count:
        halves = [
            pick(builder, vector, list(range(start, vector.type.count, 2)))
            for start in (0, 1)
        ]
        vector = builder.fadd(*halves)
    return vector


def _neighbour_sums(builder: Any, a: Any, b: Any) -> Any:
    """Sums of neighbouring lanes of a, then of b."""
    order = ir.VectorType(I32, LANES)
    halves = [
        builder.shuffle_vector(
            a, b, ir.Constant(order, list(range(start, 2 * LANES, 2)))
        )
        for start in (0, 1)
    ]
    return builder.fadd(*halves)


def reserver(size: int) -> Any:
    """Intrinsic: the address of `size` bytes on the stack."""

    @intrinsic
    def reserve(typing_context):
        def codegen(context, builder, signature, arguments):
            # numba's own helper would fill it with zeros, byte by byte.
            with builder.goto_entry_block():
                memory = builder.alloca(I8, size)
            memory.align = 64
            return builder.ptrtoint(memory, I64)

        return types.int64(), codegen

    return reserve


def to_float(builder: Any, bits: Any, dtype: torch.dtype) -> Any:
    """The 16 bits of stored values, one or a vector, as floats."""

    def shaped(kind: Any) -> Any:
        is_vector = isinstance(bits.type, ir.VectorType)
        return ir.VectorType(kind, bits.type.count) if is_vector else kind

    if dtype == torch.float16:
        return builder.fpext(builder.bitcast(bits, shaped(ir.HalfType())), shaped(F32))
    word = builder.zext(bits, shaped(I32))
    return builder.bitcast(builder.shl(word, same(word.type, 16)), shaped(F32))
