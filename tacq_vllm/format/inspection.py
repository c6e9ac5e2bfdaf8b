"""What a checkpoint holds and what it costs, counted from its files."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from tacq_vllm.format.checkpoint import (
    CheckpointReader,
    read_any_schema,
    read_schema,
)
from tacq_vllm.format.layouts import stored_bytes
from tacq_vllm.format.schema import FormatError, LayoutName, QuantizationSchema
from tacq_vllm.format.simulated import AnySchema, SimulatedSchema
from tacq_vllm.format.stored import unpack_outliers
from tacq_vllm.format.validation import header_faults, load_linear

_NUMBER = re.compile(r"[0-9]{1,9}")
"""A block's number in a module's name. A stranger's may have any number of digits."""


@dataclass(frozen=True)
class LinearInfo:
    """One quantized linear."""

    name: str
    out_features: int
    in_features: int
    outliers: int
    nbytes: int
    """Bytes of all its tensors; of a simulated one, what its parts would take."""

    @property
    def weights(self) -> int:
        """Number of weights."""
        return self.out_features * self.in_features

    @property
    def effective_bits(self) -> float:
        """Bits per weight, everything counted."""
        return self.nbytes * 8 / self.weights


@dataclass(frozen=True)
class Inspection:
    """A checkpoint in figures."""

    bits: int
    code_bits: float
    """Bits that a code takes: those of clusters have a share of an index each."""
    group_size: int
    dtype: str
    linears: tuple[LinearInfo, ...]
    checkpoint_bytes: int
    """Bytes of the weight files, unquantized tensors and headers included."""
    paper_bits: float | None
    """Bits per weight by the paper's formula, which leaves out scales and zeros; None:
    simulated."""
    tensor_parallel_sizes: tuple[int, ...] | None
    """Numbers of ranks that the linears can be cut for; None: the file does not say."""
    layout: LayoutName | None = None
    """How codes are stored; None: simulated."""
    simulated: str | None = None
    """The method whose parts the format cannot hold: the weights are in 16 bits."""

    @property
    def weights(self) -> int:
        """Weights of the quantized linears."""
        return sum(linear.weights for linear in self.linears)

    @property
    def outliers(self) -> int:
        """Weights kept in 16 bits."""
        return sum(linear.outliers for linear in self.linears)

    @property
    def linear_bytes(self) -> int:
        """Bytes of all tensors of the quantized linears, or what they would take."""
        return sum(linear.nbytes for linear in self.linears)

    @property
    def effective_bits(self) -> float:
        """Bits per weight of the quantized linears, everything counted."""
        return self.linear_bytes * 8 / self.weights


@dataclass(frozen=True)
class OutlierCounts:
    """How many weights one linear keeps, and where."""

    name: str
    per_row: Tensor
    """int64 [out]."""
    per_column: Tensor
    """int64 [in]."""


def inspect_checkpoint(folder: Path) -> Inspection:
    """Count a checkpoint's bits from the headers of its files.

    Raises:
        FormatError: the folder is not a whole TaCQ checkpoint, packed or simulated.
    """
    return inspect_weights(folder, read_any_schema(folder))


def inspect_weights(folder: Path, schema: AnySchema) -> Inspection:
    """Count as `inspect_checkpoint` does, in a folder without a config.json yet.

    Args:
        folder: has the weight files.
        schema: what config.json will say.

    Raises:
        FormatError: as `inspect_checkpoint`.
    """
    with CheckpointReader(folder) as reader:
        if isinstance(schema, SimulatedSchema):
            return _inspect_simulated(reader, schema)
        for fault in header_faults(reader, schema):
            raise FormatError(fault)
        return Inspection(
            bits=schema.bits,
            code_bits=schema.code_bits,
            group_size=schema.group_size,
            dtype=schema.dtype,
            linears=tuple(
                _inspect_linear(schema, name)
                for name in sorted(schema.linears, key=_natural_order)
            ),
            checkpoint_bytes=reader.file_bytes,
            paper_bits=schema.paper_bits,
            layout=schema.layout,
            tensor_parallel_sizes=schema.tensor_parallel_sizes,
        )


def _inspect_simulated(reader: CheckpointReader, schema: SimulatedSchema) -> Inspection:
    linears = []
    for name in sorted(schema.linears, key=_natural_order):
        linear = schema.linears[name]
        shape = (linear.out_features, linear.in_features)
        if f"{name}.weight" not in reader:
            raise FormatError(f"{name}.weight: the tensor is missing")
        if reader[f"{name}.weight"].shape != shape:
            raise FormatError(f"{name}.weight: not {list(shape)}")
        info = LinearInfo(name, *shape, linear.outliers, linear.stored_bytes)
        linears.append(info)
    return Inspection(
        bits=schema.bits,
        code_bits=schema.bits,
        group_size=schema.group_size,
        dtype=schema.dtype,
        linears=tuple(linears),
        checkpoint_bytes=reader.file_bytes,
        paper_bits=None,
        tensor_parallel_sizes=None,
        simulated=schema.method,
    )


def outlier_counts(folder: Path) -> Iterator[OutlierCounts]:
    """Count where each linear keeps weights, in the order of `Inspection.linears`.

    Raises:
        FormatError: the folder is not a packed checkpoint.
    """
    schema = read_schema(folder)
    with CheckpointReader(folder) as reader:
        for name in sorted(schema.linears, key=_natural_order):
            linear = load_linear(reader, schema, name)
            outliers = unpack_outliers(linear)
            yield OutlierCounts(
                name,
                per_row=outliers.row_offsets.diff().long(),
                per_column=outliers.columns.bincount(minlength=linear.in_features),
            )


def _inspect_linear(schema: QuantizationSchema, name: str) -> LinearInfo:
    out_features, in_features = schema.linears[name]
    return LinearInfo(
        name=name,
        out_features=out_features,
        in_features=in_features,
        outliers=schema.num_outliers(name),
        # The headers have been found equal to these.
        nbytes=stored_bytes(schema, name),
    )


def _natural_order(name: str) -> list[tuple[int, str]]:
    """Sort key under which block 9 comes before block 10."""
    return [
        (int(part), "") if _NUMBER.fullmatch(part) else (-1, part)
        for part in name.split(".")
    ]
