import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tacq_vllm.format
from tacq_vllm.format.clusters import (
    BLOCK,
    BLOCK_WORDS,
    Clusters,
    clustered_words,
    pack_clusters,
    unpack_clusters,
)
from tests.clusters import random_clusters

SPEC = Path(tacq_vllm.format.__file__).with_name("SPEC.md")
LENGTHS = st.integers(1, 220)
SEEDS = st.integers(0, 2**16)


def read_bits(words: list[int], length: int) -> list[int]:
    """A row's codes read from its bits as SPEC.md says, one at a time."""
    codes = []
    for column in range(length):
        block, place = divmod(column, BLOCK)
        data = words[block * BLOCK_WORDS : (block + 1) * BLOCK_WORDS]

        def field(column: int, data: list[int] = data) -> int:
            return (data[column // 16] >> (2 * (column % 16))) & 3

        index = (data[6] >> (2 * (place // 6))) & 3
        low = field(place)
        start = place - place % 3
        if index == 0:
            codes.append(low - 4 * (low >> 1))
        elif place - start == index - 1:
            codes.append(0)
        else:
            kept = [start + i for i in range(3) if i != index - 1]
            high = field(start + index - 1) >> kept.index(place)
            codes.append(low - 4 * (high & 1))
    return codes


@given(rows=st.integers(1, 3), length=LENGTHS, seed=SEEDS)
def test_unpack_inverts_pack(rows: int, length: int, seed: int) -> None:
    clusters = random_clusters(rows, length, seed)

    words = pack_clusters(clusters)

    assert words.dtype == torch.int32
    assert words.shape == (rows, clustered_words(length))
    read = unpack_clusters(words, length)
    assert torch.equal(read.codes, clusters.codes)
    assert torch.equal(read.indices, clusters.indices)


@given(length=LENGTHS, seed=SEEDS)
def test_the_bits_are_where_the_spec_says(length: int, seed: int) -> None:
    clusters = random_clusters(1, length, seed)

    words = [word & 0xFFFFFFFF for word in pack_clusters(clusters)[0].tolist()]

    assert read_bits(words, length) == clusters.codes[0].tolist()


def test_the_example_of_the_spec() -> None:
    clusters = Clusters(
        torch.tensor([[3, 0, -4, -1, 0, 2]], dtype=torch.int8),
        torch.tensor([[2]], dtype=torch.uint8),
    )

    words = pack_clusters(clusters)[0].tolist()

    assert words == [0x9CB, 0, 0, 0, 0, 0, 2]
    text = SPEC.read_text().split("## Clusters")[1]
    assert [int(word, 16) for word in re.findall(r"`0x(\w+)`", text)] == [0x9CB, 2]


@given(seed=SEEDS)
def test_any_pattern_of_bits_is_some_codes(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(-(2**31), 2**31, (2, 14), generator=generator).to(torch.int32)

    read = unpack_clusters(words, 2 * BLOCK)

    assert torch.equal(pack_clusters(read), words)


@given(
    length=st.integers(BLOCK, 4 * BLOCK),
    blocks=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    to_end=st.booleans(),
    rows=st.tuples(st.integers(0, 4), st.integers(0, 4)),
    seed=SEEDS,
)
def test_slices_unpack_to_slices(
    length: int,
    blocks: tuple[int, int],
    to_end: bool,
    rows: tuple[int, int],
    seed: int,
) -> None:
    start, stop = sorted(min(block, length // BLOCK) * BLOCK for block in blocks)
    stop = length if to_end else stop
    top, bottom = sorted(rows)
    clusters = random_clusters(4, length, seed)
    words = pack_clusters(clusters)

    part = words[top:bottom, clustered_words(start) : clustered_words(stop)]

    read = unpack_clusters(part, stop - start).codes
    assert torch.equal(read, clusters.codes[top:bottom, start:stop])


@pytest.mark.parametrize(
    ("codes", "index"),
    [([2, 0, 0], 0), ([-3, 0, 0], 0), ([0, 4, 0], 1), ([1, 2, 3], 1), ([0, 1, -1], 3)],
)
def test_codes_that_do_not_fit_their_index_are_refused(
    codes: list[int], index: int
) -> None:
    clusters = Clusters(
        torch.tensor([codes], dtype=torch.int8),
        torch.tensor([[index]], dtype=torch.uint8),
    )

    with pytest.raises(ValueError, match=r"a code is outside|code that is not 0"):
        pack_clusters(clusters)


@pytest.mark.parametrize("length", [96, 576, 1536, 4096, 14336])
def test_seven_bytes_hold_24_weights(length: int) -> None:
    nbytes = pack_clusters(random_clusters(1, length, 0)).nbytes

    assert nbytes == 28 * -(-length // 96)
    assert nbytes * 24 <= 7 * (length + 95)
