"""The weight files of a 16-bit model, by the names that its modules have."""

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GgufConfig, PreTrainedModel

from tacq_vllm.format.checkpoint import CheckpointWriter
from tacq_vllm.format.staging import staged_folder
from tacq_vllm.quantize.errors import QuantizeError
from tacq_vllm.quantize.source import ModelSource
from tacq_vllm.quantize.weights import WeightFiles, open_weights
from tacq_vllm.quantize.workdir import WorkDir, file_stamp, fingerprint

_SHARD_BYTES = 2_000_000_000


def open_files(
    source: ModelSource, skeleton: PreTrainedModel, workdir: WorkDir
) -> tuple[WeightFiles, WeightFiles]:
    """Open the files as published, and by the names of the modules.

    Mostly they are the same. A GGUF file, and a model whose files name tensors
    otherwise than its modules do, is read whole, once, and stored anew in the work
    folder. Another configuration or another version of Transformers, which reads them,
    has it read again.

    Args:
        source: where the files lie.
        skeleton: the model, without values.
        workdir: keeps what is stored anew.

    Raises:
        QuantizeError: a file or a tensor is missing, or is not what the model has.
    """
    # The version of Transformers is in it.
    config = skeleton.config.to_json_string(use_diff=False)
    if source.gguf:
        path = source.folder / source.gguf
        stamp = [str(path), *file_stamp(path)]
        # Every time that Transformers reads a GGUF header costs seconds.
        arguments = {
            "config": deepcopy(skeleton.config),
            "dtype": torch.float32,
            "quantization_config": GgufConfig(dequantize=True),
        }
        depends = {"gguf": stamp, "config": config}
        converted = _convert(source, workdir, depends, arguments)
        return converted, converted
    published = open_weights(source.folder)
    tied = skeleton.all_tied_weights_keys
    names = [name for name, _ in skeleton.named_parameters() if name not in tied]
    if all(name in published for name in names):
        return published, published
    depends = {"files": published.fingerprint(), "config": config}
    return published, _convert(source, workdir, depends, {"dtype": "auto"})


def check_shape(
    model: str, name: str, stored: Sequence[int], wanted: Sequence[int]
) -> None:
    """Refuse a tensor of another shape than the model has.

    Raises:
        QuantizeError: naming model and tensor, with both shapes.
    """
    if tuple(stored) != tuple(wanted):
        raise QuantizeError(
            f"{model}: {name} is {list(stored)} in the files, and {list(wanted)} by "
            "the configuration"
        )


def _convert(
    source: ModelSource,
    workdir: WorkDir,
    depends: dict[str, Any],
    arguments: dict[str, Any],
) -> WeightFiles:
    """Let Transformers read the model, and store it by the names of its modules."""
    final = workdir.folder / f"weights-{fingerprint(depends)[:16]}"
    if not final.is_dir():
        model, loading = AutoModelForCausalLM.from_pretrained(
            **source.arguments,
            **arguments,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
        for name, stored, wanted in sorted(loading["mismatched_keys"]):
            check_shape(str(source.folder), name, stored, wanted)
        missing = sorted(loading["missing_keys"])
        if missing:
            others = f"and {len(missing) - 1} more are" if missing[1:] else "is"
            raise QuantizeError(f"{source.folder}: {missing[0]} {others} missing")
        with staged_folder(final) as folder:
            writer = CheckpointWriter(folder, _SHARD_BYTES)
            written: set[int] = set()
            for name, tensor in model.state_dict().items():
                # A tied tensor is stored once, under its first name.
                if tensor.data_ptr() not in written:
                    written.add(tensor.data_ptr())
                    writer.add(name, tensor)
            writer.close()
    return open_weights(final)
