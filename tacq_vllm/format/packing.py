"""Packing of 2-, 3- and 4-bit integers into int32 words (SPEC.md, "Codes").

A code is split into planes whose widths are powers of two, so that no value ever
straddles two words: 2 = 2, 3 = 2 + 1, 4 = 4. Pure functions on tensors, no state.
"""

from torch import Tensor, arange, int32, int64, uint8
from torch.nn.functional import pad

WORD_BITS = 32
PLANE_WIDTHS = {2: (2,), 3: (2, 1), 4: (4,)}
"""Widths of the planes of a code, lowest bits first, by bits per code."""


def packed_size(length: int, width: int) -> int:
    """Number of words that hold `length` values of `width` bits."""
    return -(-length * width // WORD_BITS)


def pack_plane(values: Tensor, width: int, dim: int = -1) -> Tensor:
    """Pack integers in [0, 2**width) along `dim`, the first in the lowest bits.

    Args:
        values: integers [..., n, ...] with n at `dim`.
        width: 1, 2 or 4 bits.
        dim: the axis to pack; padded with zeros to whole words.

    Returns:
        int32 [..., packed_size(n, width), ...].
    """
    per_word = WORD_BITS // width
    values = values.movedim(dim, -1)
    values = pad(values.to(int64), (0, -values.shape[-1] % per_word))
    fields = values.unflatten(-1, (-1, per_word))
    words: Tensor = (fields << arange(0, WORD_BITS, width, device=values.device)).sum(
        -1
    )
    # int64 to int32 keeps the low 32 bits, which is the word's bit pattern.
    return words.to(int32).movedim(-1, dim).contiguous()


def unpack_plane(words: Tensor, width: int, length: int, dim: int = -1) -> Tensor:
    """Invert `pack_plane`.

    Returns:
        uint8 [..., length, ...] with `length` at `dim`.
    """
    shifts = arange(0, WORD_BITS, width, dtype=int32, device=words.device)
    fields = (words.movedim(dim, -1).unsqueeze(-1) >> shifts) & ((1 << width) - 1)
    return fields.to(uint8).flatten(-2)[..., :length].movedim(-1, dim)


def pack_codes(codes: Tensor, bits: int, dim: int = -1) -> tuple[Tensor, ...]:
    """Pack codes into one tensor per plane, lowest bits first.

    Args:
        codes: integers [..., n, ...] in [0, 2**bits), with n at `dim`.
        bits: 2, 3 or 4.
        dim: the axis to pack; padded with zeros to whole words.

    Returns:
        int32 [..., packed_size(n, width), ...] for each width of `PLANE_WIDTHS`.
    """
    planes, shift = [], 0
    for width in PLANE_WIDTHS[bits]:
        field = (codes >> shift) & ((1 << width) - 1)
        planes.append(pack_plane(field, width, dim))
        shift += width
    return tuple(planes)


def unpack_codes(
    planes: tuple[Tensor, ...], bits: int, length: int, dim: int = -1
) -> Tensor:
    """Invert `pack_codes`.

    Returns:
        uint8 [..., length, ...] with `length` at `dim`.
    """
    low, *high = (
        unpack_plane(words, width, length, dim)
        for words, width in zip(planes, PLANE_WIDTHS[bits], strict=True)
    )
    return low | (high[0] << PLANE_WIDTHS[bits][0]) if high else low
