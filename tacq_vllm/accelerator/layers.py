"""Layers that the arrays are given: their codes, and what each design does for them."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tacq_vllm.accelerator.array import Counts, Integers, count_tile, run_tile
from tacq_vllm.accelerator.costs import (
    Traffic,
    array_energy,
    layer_traffic,
    traffic_energy,
)
from tacq_vllm.accelerator.design import ArraySize, Design
from tacq_vllm.config import GptqConfig
from tacq_vllm.quantize.clusters import round_to_clusters

GRID = GptqConfig(grid_steps=20)
"""How the layers' scales are searched: coarser than by default, and so sooner."""


@dataclass(frozen=True)
class Layer:
    """A linear layer, or enough of its rows to count for all."""

    name: str
    out_features: int
    codes: Integers
    """int8 [some rows, in]."""

    @property
    def in_features(self) -> int:
        """Columns of the weight."""
        return int(self.codes.shape[1])


@dataclass(frozen=True)
class LayerWork:
    """What a design does for a layer and as many tokens as it has columns."""

    counts: Counts
    toggles: float
    traffic: Traffic
    array_pj: float
    buffer_pj: float
    memory_pj: float


class MissingModelError(Exception):
    """The model's file cannot be read."""


def quantized_layer(name: str, W: Tensor, out_features: int) -> Layer:
    """Round a weight to clusters, with a scale per row.

    Args:
        name: what the layer is called.
        W: float32 [some rows, in].
        out_features: rows of the whole layer.
    """
    weight = round_to_clusters(W, None, -1, torch.bfloat16, GRID)
    return Layer(name, out_features, weight.clusters.codes.numpy())


def random_layer(name: str, out_features: int, in_features: int, rows: int) -> Layer:
    """A layer of Gaussian weights, of which `rows` rows are made."""
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(rows, in_features, generator=generator)
    return quantized_layer(name, W, out_features)


def gguf_layers(path: Path, names: dict[str, str]) -> Iterator[Layer]:
    """Layers of a model in a GGUF file, dequantized and rounded to clusters.

    Args:
        path: the file.
        names: what the layers are called, by the names of their tensors.

    Raises:
        MissingModelError: the file or a tensor is not there, or the package that reads
            it.
    """
    try:
        from gguf import GGUFReader, dequantize
    except ImportError as error:
        raise MissingModelError(
            "reading a .gguf file needs the extra `quantize`: "
            'pip install "tacq-vllm[quantize]"'
        ) from error
    try:
        tensors = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    except (OSError, ValueError) as error:
        raise MissingModelError(f"{path}: {error}") from error
    for tensor_name, name in names.items():
        if tensor_name not in tensors:
            raise MissingModelError(f"{path}: has no tensor {tensor_name}")
        tensor = tensors[tensor_name]
        W = torch.tensor(dequantize(tensor.data, tensor.tensor_type))
        yield quantized_layer(name, W.to(torch.float32), W.shape[0])


def random_activations(in_features: int, tokens: int) -> Integers:
    """Gaussian activations in 8 bits, each token by its largest: int8 [in, tokens]."""
    x = np.random.default_rng(0).standard_normal((in_features, tokens))
    rounded: Integers = np.rint(x * 127 / np.abs(x).max(axis=0)).astype(np.int8)
    return rounded


def measure_layer(layer: Layer, design: Design, size: ArraySize) -> LayerWork:
    """Count what a design does for a layer.

    Cycles, operations and clocked bits are counted for every tile whose rows are there,
    toggles of the first tile in simulation; both are multiplied up to the number of
    tiles that the layer has.

    Args:
        layer: its rows that are there fill whole tiles, or are all.
        design: of the array's elements.
        size: of the array; its columns are the tokens.
    """
    tiles = list(_tiles(layer.codes, size.rows))
    total = -(-layer.out_features // size.rows)
    counted = [count_tile(tile, size.columns, design) for tile in tiles]
    counts = Counts(
        cycles=sum(one.cycles for one in counted),
        multiplications=sum(one.multiplications for one in counted),
        additions=sum(one.additions for one in counted),
        clocked_bits=sum(one.clocked_bits for one in counted),
    ).scaled(total / len(tiles))
    activations = random_activations(layer.in_features, size.columns)
    toggles = run_tile(tiles[0], activations, design).toggles * total
    traffic = layer_traffic(layer.out_features, layer.in_features, size, design)
    buffer_pj, memory_pj = traffic_energy(traffic)
    return LayerWork(
        counts,
        toggles,
        traffic,
        array_energy(counts, toggles, design),
        buffer_pj,
        memory_pj,
    )


def _tiles(codes: Integers, rows: int) -> Iterator[Integers]:
    """Codes of each tile, [rows, in]; the last one is filled up with zeros."""
    for start in range(0, codes.shape[0], rows):
        tile = codes[start : start + rows]
        yield np.pad(tile, ((0, rows - tile.shape[0]), (0, 0)))
