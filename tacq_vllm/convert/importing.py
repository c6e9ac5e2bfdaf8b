"""From a checkpoint of another format to a TaCQ one with the same weights."""

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelCardData
from pydantic import ValidationError

from tacq_vllm import __version__
from tacq_vllm.config import OutlierConfig, StorageDtype, one_line
from tacq_vllm.convert.folder import MAX_SHARD_BYTES, copy_companions, write_config
from tacq_vllm.convert.kept import KeptWeights
from tacq_vllm.convert.source import Source, open_source
from tacq_vllm.format.checkpoint import CheckpointWriter
from tacq_vllm.format.inspection import inspect_weights
from tacq_vllm.format.linear import PackedLinear, pack_linear
from tacq_vllm.format.outliers import select_outliers
from tacq_vllm.format.schema import DEFAULT_CIRCUIT, FormatError, QuantizationSchema
from tacq_vllm.format.staging import staged_folder
from tacq_vllm.format.validation import check_headers
from tacq_vllm.format.values import check_linear
from tacq_vllm.hub.card import UNKNOWN_ADDRESS
from tacq_vllm.hub.merge import CARD_NAME
from tacq_vllm.hub.text import use_text
from tacq_vllm.quantize.errors import QuantizeError
from tacq_vllm.quantize.progress import Progress
from tacq_vllm.quantize.source import locate_folder, model_name
from tacq_vllm.quantize.weights import open_weights
from tacq_vllm.quantize.workdir import check_output


def import_checkpoint(
    checkpoint: str,
    output: Path,
    progress: Progress,
    base: str | None = None,
    outlier_ratio: float | None = None,
) -> None:
    """Store the linears of a GPTQ or compressed-tensors checkpoint as TaCQ does.

    Codes, zero-points and scales stay what they are, and so does every other tensor.
    The folder appears only when it is whole.

    Args:
        checkpoint: a folder or a Hub id.
        output: the folder to make.
        progress: is told of finished linears.
        base: the 16-bit model that was quantized; some of its weights are kept.
        outlier_ratio: the share that is kept; by default that of recipes.

    Raises:
        FormatError: the checkpoint's config.json is damaged.
        QuantizeError: there is no checkpoint, `output` is not empty, or TaCQ cannot
            store the checkpoint.
    """
    check_output(output)
    ratio = _check_ratio(base, outlier_ratio)
    source = open_source(locate_folder(checkpoint))
    others = list(source.others())
    recipe: dict[str, Any] = {
        "method": "import",
        "format": source.layout.title,
        "source": model_name(checkpoint),
    }
    if base is not None:
        recipe |= {"base": model_name(base), "outlier_ratio": ratio}
    schema = _schema(source, recipe)
    kept = None
    if base is not None:
        with progress.phase("selection", 1) as bar:
            kept = KeptWeights(source, open_weights(locate_folder(base)), ratio)
            bar.advance()
    counts: dict[str, int] = {}
    with (
        staged_folder(output) as folder,
        progress.phase("import", len(source.linears)) as bar,
    ):
        writer = CheckpointWriter(folder, MAX_SHARD_BYTES)
        for name in source.linears:
            packed = _pack(source, name, kept, schema)
            for suffix, tensor in packed.tensors().items():
                writer.add(f"{name}.{suffix}", tensor)
            counts[name] = packed.outliers.numel() - packed.out_features - 1
            bar.advance(1, name)
        for name in others:
            writer.add(name, source.files.load(name))
        writer.close()
        schema = schema.model_copy(update={"circuits": {DEFAULT_CIRCUIT: counts}})
        copy_companions(source.folder, folder)
        _write_card(folder, schema)
        block = schema.model_dump(mode="json")
        write_config(folder, source.config | {"quantization_config": block})
        try:
            check_headers(folder, schema)
        except FormatError as error:
            raise QuantizeError(f"{checkpoint}: not a whole model: {error}") from error


def _check_ratio(base: str | None, ratio: float | None) -> float:
    if base is None and ratio is not None:
        raise QuantizeError(
            "an outlier ratio needs --base: the 16-bit model whose weights are kept"
        )
    try:
        config = OutlierConfig() if ratio is None else OutlierConfig(ratio=ratio)
    except ValidationError as error:
        raise QuantizeError(f"outliers: {one_line(error)}") from error
    return config.ratio


def _schema(source: Source, recipe: dict[str, Any]) -> QuantizationSchema:
    """What the checkpoint will say, without kept weights."""
    first = next(iter(source.linears))
    dtype: StorageDtype = "bfloat16"
    if source.linear(first).scales.dtype == torch.float16:
        dtype = "float16"
    try:
        return QuantizationSchema(
            bits=source.layout.bits,
            group_size=source.layout.group_size,
            dtype=dtype,
            linears={
                name: (linear.out_features, linear.in_features)
                for name, linear in source.linears.items()
            },
            circuits={DEFAULT_CIRCUIT: dict.fromkeys(source.linears, 0)},
            recipe=recipe,
        )
    except ValidationError as error:
        raise QuantizeError(f"{source.folder}: {one_line(error)}") from error


def _pack(
    source: Source, name: str, kept: KeptWeights | None, schema: QuantizationSchema
) -> PackedLinear:
    linear = source.linear(name)
    if linear.scales.dtype != schema.torch_dtype:
        raise QuantizeError(
            f"{name}: scales are {linear.scales.dtype}, those of others "
            f"{schema.torch_dtype}; TaCQ has one type"
        )
    codes = linear.codes
    outliers = select_outliers(linear.scales, torch.zeros_like(linear.scales).bool())
    if kept is not None:
        mask = kept.mask(name)
        codes = torch.where(mask, linear.zeros_of_codes, codes)
        outliers = select_outliers(kept.original(name).to(schema.torch_dtype), mask)
    packed = pack_linear(codes, linear.zeros, linear.scales, outliers, schema.bits)
    fault = check_linear(packed)
    if fault:
        raise QuantizeError(f"{name}.{fault}")
    return packed


def _write_card(folder: Path, schema: QuantizationSchema) -> None:
    figures = inspect_weights(folder, schema)
    name, recipe = schema.recipe["source"], schema.recipe
    kept = ""
    if "base" in recipe:
        kept = (
            f"\n{figures.outliers:,} of {figures.weights:,} weights are kept as they "
            f"are in {recipe['base']}: those with the highest |W|·|Q - W|, Q being the "
            "source.\n"
        )
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["tacq", "vllm", f"{figures.bits}-bit"],
    )
    body = f"""\
# {name}, as a TaCQ checkpoint

{name} ({recipe["format"]}), stored as a TaCQ checkpoint by tacq-vllm {__version__}:
{figures.bits} bits, {figures.effective_bits:.3f} effective bits (codes, scales,
zero-points, kept weights and indices). It was not quantized with TaCQ: codes,
zero-points and scales are those of the source.
{kept}
{use_text(UNKNOWN_ADDRESS)}"""
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}").save(folder / CARD_NAME)
