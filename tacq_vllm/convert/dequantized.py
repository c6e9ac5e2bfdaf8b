"""From a TaCQ checkpoint to an ordinary one, for tools that do not know TaCQ."""

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelCardData

from tacq_vllm import __version__
from tacq_vllm.convert.folder import (
    MAX_SHARD_BYTES,
    copy_companions,
    copy_unquantized,
    write_config,
)
from tacq_vllm.format.checkpoint import (
    CONFIG_NAME,
    CheckpointReader,
    CheckpointWriter,
)
from tacq_vllm.format.json_object import read_json
from tacq_vllm.format.schema import STORAGE_DTYPES, QuantizationSchema, parse_schema
from tacq_vllm.format.staging import staged_folder
from tacq_vllm.format.validation import check_whole, load_linear
from tacq_vllm.hub.merge import CARD_NAME
from tacq_vllm.kernels.reference import dequantize
from tacq_vllm.quantize.errors import QuantizeError
from tacq_vllm.quantize.progress import Progress
from tacq_vllm.quantize.workdir import check_output


def export_dequantized(
    source: Path,
    output: Path,
    progress: Progress,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write the weights that a checkpoint stands for, one linear at a time.

    The folder appears only when it is whole.

    Raises:
        FormatError: `tacq verify` finds a fault in the checkpoint.
        QuantizeError: `output` is not empty, or a weight does not fit the 16-bit type.
    """
    check_output(output)
    check_whole(source)
    config = read_json(source / CONFIG_NAME)
    schema = parse_schema(config.pop("quantization_config"))
    with (
        CheckpointReader(source) as reader,
        staged_folder(output) as folder,
        progress.phase("export", len(schema.linears)) as bar,
    ):
        dtype = _model_dtype(config, schema)
        writer = CheckpointWriter(folder, max_shard_bytes)
        for name in schema.linears:
            weight = dequantize(load_linear(reader, schema, name), dtype)
            if not bool(weight.isfinite().all()):
                raise QuantizeError(f"{name}: a weight is not finite in {dtype}")
            writer.add(f"{name}.weight", weight)
            bar.advance(1, name)
        copy_unquantized(reader, schema, writer)
        writer.close()
        copy_companions(source, folder)
        _write_card(folder, source, schema)
        write_config(folder, config)


def _model_dtype(config: dict[str, Any], schema: QuantizationSchema) -> torch.dtype:
    """The 16-bit type that the model is loaded in: mostly that of the scales."""
    name = config.get("dtype", config.get("torch_dtype"))
    return STORAGE_DTYPES.get(str(name), schema.torch_dtype)


def _write_card(folder: Path, source: Path, schema: QuantizationSchema) -> None:
    name, bits = source.absolute().name, f"{schema.code_bits:.3g}"
    with CheckpointReader(source) as packed, CheckpointReader(folder) as dense:
        sizes = [f"{reader.file_bytes / 1e6:.1f} MB" for reader in (dense, packed)]
    data = ModelCardData(library_name="transformers", pipeline_tag="text-generation")
    body = f"""\
# {name}, dequantized

The {len(schema.linears)} linears of the TaCQ checkpoint {name} ({bits} bits),
written out in 16 bits by tacq-vllm {__version__}, for tools that do not know TaCQ:
{sizes[0]} instead of {sizes[1]}. The weights are those that the packed
checkpoint stands for, not those of the model that it was made from.
"""
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}").save(folder / CARD_NAME)
