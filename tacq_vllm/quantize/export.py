"""Writing a checkpoint folder that appears only when it is whole."""

import copy
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tacq_vllm.config import Recipe, StorageDtype
from tacq_vllm.format.checkpoint import CheckpointWriter
from tacq_vllm.format.schema import QuantizationSchema, storage_dtype
from tacq_vllm.quantize.errors import QuantizeError
from tacq_vllm.quantize.model import BaseModel


def check_output(output: Path) -> None:
    """Refuse to write over anything.

    Raises:
        QuantizeError: `output` exists and is not an empty folder.
    """
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise QuantizeError(f"{output}: exists already; choose another --output")


@contextmanager
def staged_folder(output: Path) -> Iterator[Path]:
    """A hidden folder beside `output`, renamed to it when the body has succeeded.

    Raises:
        QuantizeError: as `check_output`.
    """
    check_output(output)
    staging = output.parent / f".{output.name}.partial"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        yield staging
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    os.replace(staging, output)


def write_unquantized(
    writer: CheckpointWriter, base: BaseModel, dtype: StorageDtype
) -> None:
    """Write every tensor that is not a quantized weight, in 16 bits.

    Raises:
        QuantizeError: a value does not fit the 16-bit type.
    """
    quantized = {f"{name}.weight" for name in base.linears()}
    written: set[int] = set()
    for name, tensor in base.model.state_dict().items():
        # A tied tensor is stored once, under its first name.
        if name in quantized or tensor.data_ptr() in written:
            continue
        written.add(tensor.data_ptr())
        if tensor.is_floating_point():
            stored = tensor.to(storage_dtype(dtype))
            if not bool(stored.isfinite().all()):
                raise QuantizeError(
                    f"{name}: a value is not finite in {dtype}; try another dtype"
                )
            tensor = stored
        writer.add(name, tensor)


def write_config(folder: Path, base: BaseModel, schema: QuantizationSchema) -> None:
    """Write tokenizer, generation config and, last, config.json."""
    base.tokenizer.save_pretrained(folder)
    if base.model.can_generate():
        base.model.generation_config.save_pretrained(folder)
    config = copy.deepcopy(base.model.config)
    config.architectures = [type(base.model).__name__]
    config.dtype = storage_dtype(schema.dtype)
    config.quantization_config = schema.model_dump(mode="json")
    config.save_pretrained(folder)


def published_recipe(recipe: Recipe) -> dict[str, Any]:
    """The recipe as a checkpoint tells it: files without their folders."""
    content = recipe.model_dump(mode="json")
    sources = content["calibration"]["sources"]
    content["calibration"]["sources"] = [Path(source).name for source in sources]
    return content
