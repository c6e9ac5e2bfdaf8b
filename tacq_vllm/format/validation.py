"""Everything that a loader refuses, in one place.

`tacq verify`, vLLM and Transformers all compare the headers with the configuration
before a weight is read (`header_faults`), and check a linear's values before a kernel
sees them (`check_linear`).
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

from tacq_vllm.format.checkpoint import CONFIG_NAME, CheckpointReader, read_schema
from tacq_vllm.format.json_object import read_json
from tacq_vllm.format.layouts import layout_of, linear_specs, tensor_names
from tacq_vllm.format.parallel import fused_modules, half_quantized
from tacq_vllm.format.schema import FormatError, QuantizationSchema, printable
from tacq_vllm.format.skeleton import Skeleton, read_skeleton
from tacq_vllm.format.stored import StoredLinear
from tacq_vllm.format.values import LinearFault, check_linear

_FLOATS = ("BF16", "F16", "F32", "F64")


def find_faults(folder: Path) -> list[str]:
    """Everything wrong with a checkpoint folder, one line each; empty: it is whole."""
    try:
        schema = read_schema(folder)
        with CheckpointReader(folder) as reader:
            faults = list(folder_faults(folder, reader, schema))
            faults = faults or list(content_faults(reader, schema))
            return [printable(fault) for fault in faults]
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


def check_headers(folder: Path, schema: QuantizationSchema) -> dict[str, str]:
    """Compare the headers of a folder's files with its configuration.

    Reads no weights.

    Returns:
        The file of each tensor of the quantized linears, by the tensor's name.

    Raises:
        FormatError: naming the first file and tensor at fault.
    """
    with CheckpointReader(folder) as reader:
        for fault in folder_faults(folder, reader, schema):
            raise FormatError(fault)
        suffixes = tensor_names(schema)
        return {
            name: reader[name].file_name
            for linear in schema.linears
            for name in (f"{linear}.{suffix}" for suffix in suffixes)
        }


def folder_faults(
    folder: Path, reader: CheckpointReader, schema: QuantizationSchema
) -> Iterator[str]:
    """Yield what the headers of the files contradict in config.json."""
    config = read_json(folder / CONFIG_NAME)
    if "transformers_weights" in config:
        yield f"{CONFIG_NAME}: transformers_weights names other weight files"
    for key in ("attn_implementation", "_attn_implementation"):
        # A name with a slash is a repo of compiled code.
        if "/" in str(config.get(key, "")):
            yield f"{CONFIG_NAME}: {key} names code to fetch: {config[key]!r}"
    yield from header_faults(reader, schema)
    skeleton = read_skeleton(folder, len(reader))
    if skeleton is not None:
        yield from _model_faults(reader, schema, skeleton)


def header_faults(
    reader: CheckpointReader, schema: QuantizationSchema
) -> Iterator[str]:
    """Yield what the headers of the files contradict in the schema."""
    for linear in schema.linears:
        specs = linear_specs(schema, linear)
        for suffix, spec in specs.items():
            name = f"{linear}.{suffix}"
            if name not in reader:
                yield f"{reader.listing}: {name}: the tensor is missing"
                continue
            stored = reader[name]
            if stored.dtype != spec.dtype or stored.shape != spec.shape:
                yield (
                    f"{stored.file_name}: {name} is {stored.dtype_name} "
                    f"{list(stored.shape)}, not {spec.dtype} {list(spec.shape)}"
                )
    weights = (name for name in reader if name.endswith(".weight"))
    dense = (name.removesuffix(".weight") for name in weights)
    for module in fused_modules(dict.fromkeys([*schema.linears, *dense])):
        for fault in half_quantized(module, schema.linears):
            yield f"{CONFIG_NAME}: {fault}"
    known = {*tensor_names(schema), "bias"}
    for name in reader:
        linear, _, suffix = name.rpartition(".")
        if linear in schema.linears and suffix not in known:
            kind = "clustered" if schema.layout == "clusters" else f"{schema.bits}-bit"
            yield (
                f"{reader[name].file_name}: {name}: a {kind} linear has no such tensor"
            )


def content_faults(
    reader: CheckpointReader, schema: QuantizationSchema
) -> Iterator[str]:
    """Yield what is wrong with the values of tensors whose headers are right."""
    files = {name: reader[name].file_name for name in reader}
    for name in schema.linears:
        fault = check_linear(load_linear(reader, schema, name))
        if fault:
            yield fault_line(files, name, fault)


def fault_line(files: Mapping[str, str], linear: str, fault: LinearFault) -> str:
    """A fault in the values of a linear, as every reader tells it.

    Args:
        files: the file of each tensor, where that is known.
        linear: name of the linear.
        fault: what `check_linear` found.
    """
    tensor = f"{linear}.{fault.tensor}"
    where = f"{files[tensor]}: " if tensor in files else ""
    return f"{where}{tensor}: {fault.reason}"


def load_linear(
    reader: CheckpointReader, schema: QuantizationSchema, name: str
) -> StoredLinear:
    """Read the tensors of one linear whose headers have been checked."""
    tensors = {
        suffix: reader.load(f"{name}.{suffix}") for suffix in linear_specs(schema, name)
    }
    return layout_of(schema).linear(tensors, schema.linears[name][1])


def _model_faults(
    reader: CheckpointReader, schema: QuantizationSchema, skeleton: Skeleton
) -> Iterator[str]:
    """Yield what the headers contradict in the model that config.json describes."""
    for name, (out_features, in_features) in schema.linears.items():
        shape = None
        if name in skeleton.linears:
            shape = skeleton.shapes[f"{name}.weight"]
        if shape != (out_features, in_features):
            has = list(shape) if shape else "no such linear"
            yield (
                f"{CONFIG_NAME}: {name}: stored as [{out_features}, {in_features}], "
                f"but the model has {has}"
            )
    for name, shape in skeleton.shapes.items():
        linear, _, suffix = name.rpartition(".")
        if linear in schema.linears and suffix == "weight":
            continue
        if name not in reader:
            if skeleton.twins.get(name, name) not in reader:
                yield f"{reader.listing}: {name}: the tensor is missing"
            continue
        stored = reader[name]
        if stored.shape != shape or stored.dtype_name not in _FLOATS:
            yield (
                f"{stored.file_name}: {name} is {stored.dtype_name} "
                f"{list(stored.shape)}, not floating point {list(shape)}"
            )
