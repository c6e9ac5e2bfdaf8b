"""Models to evaluate, by what a user calls them."""

from collections.abc import Iterator
from contextlib import contextmanager

from tacq_vllm.evaluate.errors import EvaluateError
from tacq_vllm.format.schema import FormatError
from tacq_vllm.quantize.errors import (
    QuantizeError,
    is_out_of_memory,
    loading_reason,
)
from tacq_vllm.quantize.source import ModelSource, locate_model
from tacq_vllm.quantize.workdir import file_stamp, fingerprint

_DECISIVE = ("*.safetensors", "*.bin", "*config.json", "tokenizer*", "*.model")


@contextmanager
def opened(model: str) -> Iterator[ModelSource]:
    """Give a model's files to what loads it.

    Raises:
        EvaluateError: there is no such model, or the body fails; in one line.
        MemoryError, RuntimeError, OSError: out of memory.
    """
    try:
        yield locate_model(model)
    except (FormatError, QuantizeError, EvaluateError):
        raise
    # Of a broken config.json or tokenizer.json Transformers raises anything.
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise EvaluateError(
            f"{model}: cannot be loaded: {loading_reason(error)}"
        ) from error


def model_identity(source: ModelSource) -> str:
    """Digest of the names, sizes and times of the files that decide what it says."""
    if source.gguf:
        files = [source.folder / source.gguf]
    else:
        files = [path for pattern in _DECISIVE for path in source.folder.glob(pattern)]
    return fingerprint({path.name: file_stamp(path) for path in files})
