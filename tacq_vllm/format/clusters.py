"""FineQ's layout: weights in clusters of three, outliers protected inside.

The idea is that of FineQ (arXiv 2504.19746): clusters of few weights, 3 bits for the
outliers of a cluster, index and data stored together at aligned places. Which bit lies
where is ours (SPEC.md, "Clusters"). A cluster takes 6 bits either way:

* without an outlier, three 2-bit codes, -2 to 1;
* with one, two 3-bit codes, -4 to 3, for its larger weights; the third weight is zero.

Two neighbouring clusters, a pair, share an index of 2 bits that says which: 0, or 1 +
the place of the zeroed weight. 24 weights are 6 bytes of codes and 1 of indices.

Codes are two's complement: -2 to 1 holds zero and wastes no pattern, which plus and
minus one with a sign bit would; the scale carries a sign that turns the longer side of
the range to where a row needs it. On Gaussian weights the squared error is 0.099 of the
weights' own, with sign and magnitude (-1 to 1, -3 to 3) 0.127. A pulse train whose
length is the magnitude then has at most 2 pulses, or 4 in a cluster with an outlier.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from tacq_vllm.format.packing import pack_plane, unpack_plane

CLUSTER = 3
"""Weights of a cluster."""

PAIR = 2 * CLUSTER
"""Weights that share an index."""

BLOCK = 96
"""Weights of a block: the least number whose codes and indices fill whole words."""

BLOCK_WORDS = 7
"""Words of a block: six of codes, then one of indices."""

NARROW = (-2, 1)
"""Smallest and largest code of a cluster without an outlier."""

WIDE = (-4, 3)
"""Smallest and largest code of a cluster with one."""

_FIELD_BITS = 2

# Of a cluster with an outlier, by index and place: which bit of the zeroed weight's
# field is the high bit of the code. The first kept weight has bit 0, the second bit 1.
_HIGH_BIT = torch.tensor([[0, 0, 0], [0, 0, 1], [0, 0, 1], [0, 1, 0]])


@dataclass(frozen=True)
class Clusters:
    """The codes of rows of weights, unpacked."""

    codes: Tensor
    """int8 [..., n], in `WIDE`; in `NARROW` where the pair's index is 0."""
    indices: Tensor
    """uint8 [..., ceil(n / 6)]: 0, or 1 + the place of the zeroed weight."""


def clustered_words(length: int) -> int:
    """Number of words that hold a row of `length` weights."""
    return -(-length // BLOCK) * BLOCK_WORDS


def pack_clusters(clusters: Clusters) -> Tensor:
    """Pack rows of codes and indices, padded with zeros to whole blocks.

    Returns:
        int32 [..., clustered_words(n)].

    Raises:
        ValueError: a code is out of its range, or that of a zeroed weight is not 0.
    """
    length = clusters.codes.shape[-1]
    codes = pad(clusters.codes, (0, -length % BLOCK))
    pairs = codes.shape[-1] // PAIR
    indices = pad(clusters.indices, (0, pairs - clusters.indices.shape[-1]))
    grouped = codes.unflatten(-1, (pairs, 2, CLUSTER)).to(torch.int64)
    zeroed = _zeroed(indices)
    _check_codes(grouped, indices, zeroed)
    shifts = _high_bits(indices)
    high = ((grouped < 0).to(torch.int64) << shifts).sum(-1, keepdim=True)
    fields = torch.where(zeroed, high, grouped & 3)
    return torch.cat(
        [
            _blocks(pack_plane(fields.flatten(-3), _FIELD_BITS), BLOCK_WORDS - 1),
            _blocks(pack_plane(indices, _FIELD_BITS), 1),
        ],
        dim=-1,
    ).flatten(-2)


def unpack_clusters(words: Tensor, length: int) -> Clusters:
    """Invert `pack_clusters`. Every pattern of bits stands for some codes.

    Args:
        words: int32 [..., clustered_words(length)].
        length: weights of a row.
    """
    blocks = _blocks(words, BLOCK_WORDS)
    count = blocks.shape[-2] * BLOCK
    data, index_words = blocks[..., :-1].flatten(-2), blocks[..., -1]
    pairs = count // PAIR
    indices = unpack_plane(index_words, _FIELD_BITS, pairs)
    fields = unpack_plane(data, _FIELD_BITS, count).to(torch.int64)
    grouped = fields.unflatten(-1, (pairs, 2, CLUSTER))
    zeroed = _zeroed(indices)
    shared = (grouped * zeroed).sum(-1, keepdim=True)
    is_wide = (indices > 0)[..., None, None]
    high = torch.where(is_wide, shared >> _high_bits(indices), grouped >> 1) & 1
    codes = (grouped - 4 * high).masked_fill(zeroed, 0).to(torch.int8)
    return Clusters(
        codes.flatten(-3)[..., :length].contiguous(),
        indices[..., : -(-length // PAIR)].contiguous(),
    )


def _blocks(words: Tensor, size: int) -> Tensor:
    """View [..., n] as [..., n / size, size]."""
    return words.view(*words.shape[:-1], words.shape[-1] // size, size)


def _zeroed(indices: Tensor) -> Tensor:
    """Which places are zeroed: bool [..., pairs, 1, 3], the same in both clusters."""
    places = torch.arange(1, CLUSTER + 1, device=indices.device)
    return indices[..., None, None] == places


def _high_bits(indices: Tensor) -> Tensor:
    """`_HIGH_BIT` of every place: int64 [..., pairs, 1, 3]."""
    return _HIGH_BIT.to(indices.device)[indices.to(torch.int64)].unsqueeze(-2)


def _check_codes(grouped: Tensor, indices: Tensor, zeroed: Tensor) -> None:
    is_narrow = (indices == 0)[..., None, None]
    low = torch.where(is_narrow, NARROW[0], WIDE[0])
    high = torch.where(is_narrow, NARROW[1], WIDE[1])
    if bool(((grouped < low) | (grouped > high)).any()):
        raise ValueError(
            f"a code is outside {NARROW[0]} to {NARROW[1]}, "
            f"or {WIDE[0]} to {WIDE[1]} beside an outlier"
        )
    if bool(((grouped != 0) & zeroed).any()):
        raise ValueError("a weight that its index zeroes has a code that is not 0")
