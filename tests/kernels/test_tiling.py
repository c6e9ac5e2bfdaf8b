"""The order that weights have on a GPU, and back."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from tacq_vllm.format.linear import PackedLinear
from tacq_vllm.format.outliers import Outliers, encode_outliers
from tacq_vllm.format.packing import unpack_codes
from tacq_vllm.kernels import tiling
from tacq_vllm.kernels.reference import dequantize
from tacq_vllm.kernels.tiles import (
    STRIP,
    block_columns,
    block_words,
    field_of_strip,
    part_of_strip,
)
from tacq_vllm.kernels.tiling import can_tile, tile, untile
from tests.builders import random_linear
from tests.clusters import random_clustered


def assert_equal(linear: PackedLinear, other: PackedLinear) -> None:
    tensors, others = linear.tensors(), other.tensors()
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == others[name].dtype, name
        assert torch.equal(tensor, others[name]), name
        assert others[name].is_contiguous(), name
    assert (linear.bits, linear.in_features) == (other.bits, other.in_features)


@given(
    bits=st.sampled_from([2, 3, 4]),
    out_features=st.integers(1, 70),
    in_features=st.sampled_from([448, 480, 512, 896, 1024, 1280]),
    group_size=st.sampled_from([-1, 32, 64, 128, 256]),
    density=st.sampled_from([0, 0.01, 0.05, 1]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16]),
    seed=st.integers(0, 2**16),
)
def test_nothing_is_lost(
    bits: int,
    out_features: int,
    in_features: int,
    group_size: int,
    density: float,
    dtype: torch.dtype,
    seed: int,
) -> None:
    assume(group_size == -1 or in_features % group_size == 0)
    packed, _ = random_linear(
        bits, out_features, in_features, group_size, density, dtype, seed
    )
    assume(can_tile(packed))

    assert_equal(packed, untile(tile(packed)))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_where_codes_are(bits: int) -> None:
    """Read with Python's numbers, as the layout is described."""
    columns = 2 * block_columns(bits)
    packed, _ = random_linear(bits, 3, columns, 64, 0, torch.bfloat16, 4)
    codes = unpack_codes(packed.weight_planes, bits, columns).tolist()
    words = tile(packed).qweight.tolist()

    for row, block in ((0, 0), (2, 1)):
        start = block * block_words(bits)
        own = [word % 2**32 for word in words[row][start : start + block_words(bits)]]
        halves = [half for word in own for half in (word % 2**16, word >> 16)]
        parts = [
            halves[first : first + STRIP] for first in range(0, len(halves), STRIP)
        ]
        found = []
        for strip in range(block_columns(bits) // STRIP):
            part, field = part_of_strip(strip, bits), field_of_strip(strip, bits)
            if (bits, field) == (3, 5):
                bits_of = zip(*parts, strict=True)
                found += [sum((h >> 15) << n for n, h in enumerate(b)) for b in bits_of]
            else:
                found += [half >> bits * field & 2**bits - 1 for half in parts[part]]
        first = block * block_columns(bits)
        assert found == codes[row][first : first + block_columns(bits)]


def test_kept_weights_that_look_like_what_is_left_over() -> None:
    packed, _ = random_linear(2, 40, 8192, 64, 0, torch.bfloat16, 0)
    rows = torch.tensor([0, 0, 3, 16, 16, 17, 32])
    columns = torch.tensor([0, 4096, 4096, 0, 1, 0, 8191], dtype=torch.int32)
    values = torch.tensor([0, 0, 0, 0, 1, -0.0, 0], dtype=torch.bfloat16)
    offsets = torch.bincount(rows, minlength=40).cumsum(0)
    offsets = torch.cat((torch.zeros(1), offsets)).to(torch.int32)
    table = encode_outliers(Outliers(offsets, columns, values))
    packed = PackedLinear.from_tensors(
        packed.tensors() | {"outliers": table}, packed.bits, packed.in_features
    )

    assert_equal(packed, untile(tile(packed)))


def test_rows_a_part_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    packed, _ = random_linear(3, 70, 960, 64, 0.02, torch.bfloat16, 1)
    tiled = tile(packed)

    monkeypatch.setattr(tiling, "_ROWS_AT_A_TIME", 16)

    assert_equal(packed, untile(tiled))


def test_clusters_come_back_as_codes() -> None:
    clustered, dense = random_clustered(40, 960, -1, 0.02, torch.bfloat16, 2)

    codes = untile(tile(clustered))

    assert codes.bits == 3
    assert torch.equal(dequantize(codes), dequantize(clustered))
    assert torch.equal(codes.outliers, clustered.outliers)
    torch.testing.assert_close(dequantize(codes).double(), dense)


def test_tensors_make_the_linear_again() -> None:
    for bits in (2, 3):
        packed, _ = random_linear(bits, 20, 512, 64, 0.02, torch.float16, 3)
        tiled = tile(packed)

        again = tiled.layout.linear(tiled.tensors(), 512)

        assert again.layout == tiled.layout
        assert again.in_features == tiled.in_features
        for name, tensor in tiled.tensors().items():
            assert again.tensors()[name] is tensor, name
