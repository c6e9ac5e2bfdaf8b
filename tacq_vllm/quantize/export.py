"""From the last pass and the base model to a checkpoint folder."""

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from tacq_vllm.config import Recipe, StorageDtype, published_choices
from tacq_vllm.format.checkpoint import CheckpointWriter
from tacq_vllm.format.parallel import tensor_parallel_sizes
from tacq_vllm.format.schema import (
    DEFAULT_CIRCUIT,
    FORMAT_VERSIONS,
    QuantizationSchema,
    storage_dtype,
)
from tacq_vllm.format.simulated import (
    SIMULATED_KEY,
    AnySchema,
    SimulatedLinear,
    SimulatedSchema,
    effective_bits,
)
from tacq_vllm.format.staging import staged_folder
from tacq_vllm.format.stored import Layout
from tacq_vllm.quantize.errors import QuantizeError
from tacq_vllm.quantize.model import BaseModel
from tacq_vllm.quantize.progress import Progress
from tacq_vllm.quantize.quantized import LinearReport, QuantizedBlocks
from tacq_vllm.quantize.workdir import check_output

REPORT_NAME = "report.jsonl"
TIMINGS_NAME = "timings.json"
GENERATION_CONFIG_NAME = "generation_config.json"

WriteCard = Callable[[Path, AnySchema], None]
"""Adds the model card to a folder that has all weights, given what config.json says."""


def export_checkpoint(
    base: BaseModel,
    recipe: Recipe,
    output: Path,
    blocks: QuantizedBlocks,
    progress: Progress,
    write_card: WriteCard,
) -> None:
    """Write the checkpoint folder, which appears only when it is whole.

    Raises:
        QuantizeError: as `check_output`, or a value does not fit the 16-bit type.
    """
    check_output(output)
    dtype = base.storage_dtype(recipe.export.dtype)
    with staged_folder(output) as folder, progress.phase("export", 1) as bar:
        writer = CheckpointWriter(folder, recipe.export.max_shard_bytes)
        for name in base.linears():
            for suffix, tensor in blocks.tensors(name).items():
                writer.add(f"{name}.{suffix}", tensor)
        _write_unquantized(writer, base, dtype)
        writer.close()
        reports = list(blocks.reports())
        schema: AnySchema
        if blocks.layout is None:
            schema = _simulated_schema(base, recipe, reports)
        else:
            schema = _packed_schema(base, recipe, reports, blocks.layout)
        rows = [json.dumps(asdict(report)) + "\n" for report in reports]
        (folder / REPORT_NAME).write_text("".join(rows))
        timings = {"phases": progress.seconds, "blocks": blocks.seconds()}
        (folder / TIMINGS_NAME).write_text(json.dumps(timings, indent=2) + "\n")
        write_card(folder, schema)
        # Last: without config.json nothing takes the folder for a checkpoint.
        _write_config(folder, base, schema)
        bar.advance()


def _packed_schema(
    base: BaseModel, recipe: Recipe, reports: list[LinearReport], layout: Layout
) -> QuantizationSchema:
    shapes, group_size = _shapes(base), recipe.group_size
    return QuantizationSchema(
        format_version=FORMAT_VERSIONS[layout.name],
        layout=layout.name,
        bits=recipe.bits,
        group_size=group_size,
        dtype=base.storage_dtype(recipe.export.dtype),
        linears=shapes,
        circuits={DEFAULT_CIRCUIT: {r.name: r.outliers for r in reports}},
        tensor_parallel_sizes=_tensor_parallel_sizes(base, shapes, group_size, layout),
        recipe=published_choices(recipe, recipe.sections_of_others),
    )


def _simulated_schema(
    base: BaseModel, recipe: Recipe, reports: list[LinearReport]
) -> SimulatedSchema:
    shapes = _shapes(base)
    linears = {
        report.name: SimulatedLinear(
            out_features=shapes[report.name][0],
            in_features=shapes[report.name][1],
            outliers=report.outliers,
            stored_bytes=report.stored_bytes,
        )
        for report in reports
    }
    return SimulatedSchema(
        method=recipe.method,
        bits=reports[0].bits,
        group_size=reports[0].group_size,
        dtype=base.storage_dtype(recipe.export.dtype),
        effective_bits=effective_bits(linears),
        linears=linears,
        recipe=published_choices(recipe, recipe.sections_of_others),
    )


def _shapes(base: BaseModel) -> dict[str, tuple[int, int]]:
    return {
        name: (linear.out_features, linear.in_features)
        for name, linear in base.linears().items()
    }


def _tensor_parallel_sizes(
    base: BaseModel,
    shapes: dict[str, tuple[int, int]],
    group_size: int,
    layout: Layout,
) -> tuple[int, ...] | None:
    config = base.model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None)
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    # Some families have other numbers in each block.
    if not isinstance(heads, int) or not isinstance(kv_heads, int):
        return None
    return tensor_parallel_sizes(shapes, group_size, heads, kv_heads, layout)


def _write_unquantized(
    writer: CheckpointWriter, base: BaseModel, dtype: StorageDtype
) -> None:
    """Write every tensor that is not a quantized weight, in 16 bits.

    Raises:
        QuantizeError: a value does not fit the 16-bit type.
    """
    quantized = {f"{name}.weight" for name in base.linears()}
    # Where the linears were published under other names, so were their neighbours.
    is_known = all(name in base.published for name in quantized)
    files = base.published if is_known else base.weights
    for name in files:
        if name in quantized:
            continue
        tensor = files.load(name)
        if tensor.is_floating_point():
            stored = tensor.to(storage_dtype(dtype))
            if not bool(stored.isfinite().all()):
                raise QuantizeError(
                    f"{name}: a value is not finite in {dtype}; try another dtype"
                )
            tensor = stored
        writer.add(name, tensor)


def _write_config(folder: Path, base: BaseModel, schema: AnySchema) -> None:
    """Write tokenizer, generation config and, last, config.json."""
    base.tokenizer.save_pretrained(folder)
    published = base.published.folder / GENERATION_CONFIG_NAME
    if published.is_file():
        shutil.copyfile(published, folder / GENERATION_CONFIG_NAME)
    elif base.model.can_generate():
        base.model.generation_config.save_pretrained(folder)
    config = copy.deepcopy(base.model.config)
    config.architectures = [type(base.model).__name__]
    config.dtype = storage_dtype(schema.dtype)
    is_simulated = isinstance(schema, SimulatedSchema)
    key = SIMULATED_KEY if is_simulated else "quantization_config"
    setattr(config, key, schema.model_dump(mode="json"))
    config.save_pretrained(folder)
