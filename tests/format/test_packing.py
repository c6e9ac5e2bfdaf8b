import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tacq_vllm.format.packing import (
    PLANE_WIDTHS,
    pack_codes,
    pack_plane,
    packed_size,
    unpack_codes,
    unpack_plane,
)


def random_codes(bits: int, shape: tuple[int, ...], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2**bits, shape, generator=generator, dtype=torch.uint8)


@given(
    bits=st.sampled_from([2, 3, 4]),
    length=st.integers(1, 100),
    other=st.integers(1, 5),
    dim=st.sampled_from([0, 1]),
    seed=st.integers(0, 2**16),
)
def test_unpack_inverts_pack(
    bits: int, length: int, other: int, dim: int, seed: int
) -> None:
    shape = (length, other) if dim == 0 else (other, length)
    codes = random_codes(bits, shape, seed)

    planes = pack_codes(codes, bits, dim)

    for plane, width in zip(planes, PLANE_WIDTHS[bits], strict=True):
        assert plane.dtype == torch.int32
        assert plane.is_contiguous()
        assert plane.shape[dim] == packed_size(length, width)
        assert plane.shape[1 - dim] == other
    assert torch.equal(unpack_codes(planes, bits, length, dim), codes)


@given(
    width=st.sampled_from([1, 2, 4]),
    length=st.integers(1, 70),
    seed=st.integers(0, 2**16),
)
def test_word_layout(width: int, length: int, seed: int) -> None:
    values = random_codes(width, (length,), seed)

    words = pack_plane(values, width).tolist()

    per_word = 32 // width
    expected = [0] * -(-length // per_word)
    for index, value in enumerate(values.tolist()):
        expected[index // per_word] |= value << (index % per_word * width)
    assert [word & 0xFFFFFFFF for word in words] == expected


def test_three_bits_are_two_low_and_one_high() -> None:
    codes = torch.tensor([0b101, 0b010, 0b111, 0b100])

    low, high = pack_codes(codes, 3)

    assert low.tolist() == [0b00_11_10_01]
    assert high.tolist() == [0b1101]


@pytest.mark.parametrize(
    ("bits", "words"), [(2, [4]), (3, [4, 2]), (4, [8])], ids=["w2", "w3", "w4"]
)
def test_planes_take_exactly_the_nominal_bits(bits: int, words: list[int]) -> None:
    planes = pack_codes(torch.zeros(1, 64, dtype=torch.uint8), bits)

    assert [plane.shape[1] for plane in planes] == words


def test_the_sign_bit_of_a_word_holds_a_code() -> None:
    words = pack_plane(torch.full((8,), 15), width=4)

    assert words.tolist() == [-1]
    assert unpack_plane(words, 4, 8).tolist() == [15] * 8
