"""Everything that a loader refuses, in one place.

`tacq verify`, vLLM and Transformers all compare the headers with the configuration
before a weight is read (`header_faults`), and check a linear's values before a kernel
sees them (`check_linear`).
"""

from collections.abc import Iterator
from pathlib import Path

from tacq_vllm.format.checkpoint import CheckpointReader, read_schema
from tacq_vllm.format.linear import (
    PackedLinear,
    check_linear,
    linear_specs,
    tensor_names,
)
from tacq_vllm.format.schema import FormatError, QuantizationSchema


def find_faults(folder: Path) -> list[str]:
    """Everything wrong with a checkpoint folder, one line each; empty: it is whole."""
    try:
        schema = read_schema(folder)
        with CheckpointReader(folder) as reader:
            faults = list(header_faults(reader, schema))
            return faults or list(content_faults(reader, schema))
    except FormatError as error:
        return [str(error)]


def check_whole(folder: Path) -> None:
    """Refuse a folder in which `find_faults` finds anything.

    Raises:
        FormatError: naming the first fault.
    """
    faults = find_faults(folder)
    if faults:
        more = f" (`tacq verify` names {len(faults) - 1} more)" if faults[1:] else ""
        raise FormatError(f"{folder}: {faults[0]}{more}")


def check_headers(folder: Path, schema: QuantizationSchema) -> None:
    """Compare the files' headers with the schema; reads no weights.

    Raises:
        FormatError: naming the first tensor that is missing, extra or misshapen.
    """
    with CheckpointReader(folder) as reader:
        for fault in header_faults(reader, schema):
            raise FormatError(fault)


def header_faults(
    reader: CheckpointReader, schema: QuantizationSchema
) -> Iterator[str]:
    """Yield what the headers of the files contradict in the schema."""
    for linear in schema.linears:
        specs = linear_specs(schema, linear)
        for suffix, spec in specs.items():
            name = f"{linear}.{suffix}"
            if name not in reader:
                yield f"{name}: the tensor is missing"
                continue
            stored = reader[name]
            if stored.dtype != spec.dtype or stored.shape != spec.shape:
                yield (
                    f"{stored.file_name}: {name} is {stored.dtype_name} "
                    f"{list(stored.shape)}, not {spec.dtype} {list(spec.shape)}"
                )
    known = {*tensor_names(schema.bits), "bias"}
    for name in reader:
        linear, _, suffix = name.rpartition(".")
        if linear in schema.linears and suffix not in known:
            yield (
                f"{reader[name].file_name}: {name}: a {schema.bits}-bit linear has no "
                "such tensor"
            )


def content_faults(
    reader: CheckpointReader, schema: QuantizationSchema
) -> Iterator[str]:
    """Yield what is wrong with the values of tensors whose headers are right."""
    for name in schema.linears:
        fault = check_linear(load_linear(reader, schema, name))
        if fault:
            file_name = reader[f"{name}.qweight"].file_name
            yield f"{file_name}: {name}.{fault}"


def load_linear(
    reader: CheckpointReader, schema: QuantizationSchema, name: str
) -> PackedLinear:
    """Read the tensors of one linear whose headers have been checked."""
    tensors = {
        suffix: reader.load(f"{name}.{suffix}") for suffix in linear_specs(schema, name)
    }
    return PackedLinear.from_tensors(tensors, schema.bits, schema.linears[name][1])
