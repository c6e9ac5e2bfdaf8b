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

I1, I8, I16, I32, I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
F32 = ir.FloatType()
WORDS = ir.VectorType(I32, LANES)
FLOATS = ir.VectorType(F32, LANES)


@dataclass(frozen=True)
class Team:
    """C functions that tell a thread its place in a parallel region."""

    thread_number: Callable[[], int]
    num_threads: Callable[[], int]
    wait: Callable[[], None]
    """Returns when all threads have called it."""


def sharer(team: Team) -> Any:
    """Compile the calling thread's part of the numbers `first` to before `last`."""
    thread_number, num_threads = team.thread_number, team.num_threads

    @numba.njit(inline="always")
    def share(first, last):
        size = (last - first + num_threads() - 1) // num_threads()
        start = first + thread_number() * size
        return start, min(start + size, last)

    return share


def taker(argument: int) -> Any:
    """Intrinsic: the next number, from 0 on, that no thread of the team has taken.

    It takes the address of a kernel's arguments, one of which is a 0 to count in. A
    thread that is slower than others, as it shares its core, takes fewer.
    """

    @intrinsic
    def take(typing_context, pointer):
        def codegen(context, builder, signature, arguments):
            numbers = builder.bitcast(arguments[0], I64.as_pointer())
            counter = builder.gep(numbers, [I64(argument)])
            return builder.atomic_rmw("add", counter, I64(1), "monotonic")

        return types.int64(types.voidptr), codegen

    return take


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


def lanes_below(builder: Any, valid: Any, count: int) -> Any:
    """Which of `count` lanes are among the first `valid`: a vector of bits."""
    order = ir.VectorType(I32, count)
    numbers = ir.Constant(order, list(range(count)))
    bound = splat(builder, builder.trunc(valid, I32), order)
    return builder.icmp_unsigned("<", numbers, bound)


def load_some(builder: Any, base: Any, kind: Any, valid: Any) -> Any:
    """Load the first `valid` lanes of a vector at an address; the others are zero."""
    mask = lanes_below(builder, valid, kind.count)
    pointer = builder.inttoptr(base, kind.as_pointer())
    name = f"llvm.masked.load.v{kind.count}{kind.element}.p0"
    arguments = [pointer, I32(1), mask, same(kind, 0)]
    return call(builder, name, kind, arguments)


def prefetch(builder: Any, place: Any, size: int) -> None:
    """Ask for `size` bytes at an address; they need not exist."""
    kind = ir.FunctionType(ir.VoidType(), [I8.as_pointer(), I32, I32, I32])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    read, everywhere, data = I32(0), I32(3), I32(1)
    for line in range(0, size, 64):
        pointer = builder.inttoptr(builder.add(place, I64(line)), I8.as_pointer())
        builder.call(function, [pointer, read, everywhere, data])


def call(builder: Any, name: str, result: Any, arguments: list[Any]) -> Any:
    """Call one of LLVM's own functions."""
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    function = cgutils.get_or_insert_function(builder.module, kind, name)
    return builder.call(function, arguments)


def same(kind: Any, number: float) -> Any:
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
    return pick_both(builder, vector, vector, lanes)


def pick_both(builder: Any, a: Any, b: Any, lanes: list[int]) -> Any:
    """The named lanes of two vectors; those of the second have the higher numbers."""
    order = ir.Constant(ir.VectorType(I32, len(lanes)), lanes)
    return builder.shuffle_vector(a, b, order)


def shift_words(builder: Any, words: Any, shift: int) -> Any:
    """Words shifted to the right, or by a negative count to the left."""
    if shift == 0:
        return words
    move = builder.lshr if shift > 0 else builder.shl
    return move(words, same(words.type, abs(shift)))


def byte_field(builder: Any, words: Any, shift: int, mask: int) -> Any:
    """Bytes shifted as `shift_words` does, and masked."""
    shifted = shift_words(builder, words, shift)
    return builder.and_(shifted, same(words.type, 0x01010101 * mask))


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
    halves = [
        pick_both(builder, a, b, list(range(start, 2 * LANES, 2))) for start in (0, 1)
    ]
    return builder.fadd(*halves)


def transpose(builder: Any, vectors: list[Any]) -> list[Any]:
    """Of as many vectors as each has parts: part i of vector j to part j of i.

    A part is a lane, or several where there are fewer vectors than lanes.
    """
    rows, parts = list(vectors), range(len(vectors))
    width = vectors[0].type.count // len(vectors)

    def lanes(numbers: list[int]) -> list[int]:
        return [width * number + lane for number in numbers for lane in range(width)]

    step = len(rows) // 2
    while step:
        for i in (n for n in parts if not n & step):
            a, b = rows[i], rows[i + step]
            upper = [n + len(rows) - step if n & step else n for n in parts]
            lower = [n + len(rows) if n & step else n + step for n in parts]
            rows[i] = pick_both(builder, a, b, lanes(upper))
            rows[i + step] = pick_both(builder, a, b, lanes(lower))
        step //= 2
    return rows


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


def stored_type(dtype: torch.dtype) -> Any:
    """The LLVM type of stored values: of 16-bit floats, integers."""
    return F32 if dtype == torch.float32 else I16


def to_float(builder: Any, bits: Any, dtype: torch.dtype) -> Any:
    """Stored values, one or a vector, as floats."""
    if dtype == torch.float32:
        return bits
    if dtype == torch.float16:
        halves = builder.bitcast(bits, _shaped(bits, ir.HalfType()))
        return builder.fpext(halves, _shaped(bits, F32))
    word = builder.zext(bits, _shaped(bits, I32))
    word = builder.shl(word, same(word.type, 16))
    return builder.bitcast(word, _shaped(bits, F32))


def from_float(builder: Any, value: Any, dtype: torch.dtype) -> Any:
    """Floats, one or a vector, as stored values."""
    if dtype == torch.float32:
        return value
    if dtype == torch.float16:
        half = builder.fptrunc(value, _shaped(value, ir.HalfType()))
        return builder.bitcast(half, _shaped(value, I16))
    bits = builder.bitcast(value, _shaped(value, I32))
    # To the nearest, of two equally near ones to the even.
    odd = builder.and_(builder.lshr(bits, same(bits.type, 16)), same(bits.type, 1))
    up = builder.add(builder.add(bits, same(bits.type, 0x7FFF)), odd)
    none = builder.fcmp_unordered("uno", value, value)
    rounded = builder.select(none, same(bits.type, 0x7FC00000), up)
    rounded = builder.lshr(rounded, same(bits.type, 16))
    return builder.trunc(rounded, _shaped(value, I16))


def _shaped(value: Any, element: Any) -> Any:
    """A type for as many elements as a value has."""
    is_vector = isinstance(value.type, ir.VectorType)
    return ir.VectorType(element, value.type.count) if is_vector else element


def put_tokens(
    builder: Any, out: Any, rows: Any, values: Any, dtype: torch.dtype
) -> None:
    """Store one row's results, a vector of floats, in out [tokens, rows]."""
    stored = from_float(builder, values, dtype)
    for token in range(values.type.count):
        place = builder.add(out, builder.mul(rows, I64(dtype.itemsize * token)))
        put(builder, place, builder.extract_element(stored, I32(token)))
