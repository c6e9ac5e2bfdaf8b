"""Clusters in Triton (SPEC.md, "Clusters"): codes by table.

A cluster's six bits and its index of two are the number of an entry; the entry's bytes
are the cluster's codes, with 4 added. Half a block, 48 columns, has three words of
fields and half a word of indices.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from tacq_vllm.format.clusters import BLOCK_WORDS, CLUSTER, WIDE, unpack_clusters

HALF = 48
"""Columns of half a block."""

_ENTRIES = 256


@functools.cache
def code_table(device: torch.device) -> Tensor:
    """Codes of every cluster, 4 added, in the low three bytes of int32 [256]."""
    numbers = torch.arange(_ENTRIES, dtype=torch.int32)
    words = torch.zeros(_ENTRIES, BLOCK_WORDS, dtype=torch.int32)
    words[:, 0], words[:, -1] = numbers & 63, numbers >> 6
    codes = unpack_clusters(words, CLUSTER).codes.to(torch.int32) - WIDE[0]
    entries: Tensor = (codes << torch.arange(0, 8 * CLUSTER, 8)).sum(-1)
    return entries.to(torch.int32).to(device)


@triton.jit
def cluster_entries(table_ptr, low, high, shift, indices, pair):
    """Entries of clusters: int32 of the words' shape.

    Their six bits begin at bit `shift` of the word `low` and go on in `high`; the index
    is that of a pair of the half block.
    """
    # In two steps, because a word cannot be shifted by 32 bits.
    fields = (low >> shift | (high << 1) << (31 - shift)) & 63
    return tl.load(table_ptr + (fields | (indices >> (2 * pair) & 3) << 6))


@triton.jit
def entry_code(entry, place):
    """The code at a place of clusters: float32.

    An integer put into the mantissa of 2**23 is a float without a conversion.
    """
    bits = (entry >> (8 * place)) & 7 | 0x4B000000
    return bits.to(tl.float32, bitcast=True) - 8388612.0


@triton.jit
def half_word(words_ptr, rows, halves, number, num_words, mask):
    """A word of fields of half blocks, unsigned."""
    place = rows * num_words + halves // 2 * 7 + halves % 2 * 3 + number
    return tl.load(words_ptr + place, mask=mask, other=0).to(tl.uint32, bitcast=True)


@triton.jit
def half_indices(words_ptr, rows, halves, num_words, mask):
    """The indices of half blocks' eight pairs, unsigned, in the low 16 bits."""
    place = rows * num_words + halves // 2 * 7 + 6
    words = tl.load(words_ptr + place, mask=mask, other=0).to(tl.uint32, bitcast=True)
    return words >> (halves % 2 * 16)
