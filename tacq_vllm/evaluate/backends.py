"""What runs a model that is evaluated: one function opens it on either engine."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch

from tacq_vllm.evaluate.errors import EvaluateError
from tacq_vllm.evaluate.runner import Runner

Engine = Literal["hf", "vllm"]
Dtype = Literal["float32", "bfloat16", "float16"]

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True)
class Backend:
    """An engine and its choices."""

    engine: Engine
    dtype: Dtype
    """Of weights and activations."""
    max_length: int
    """Tokens of a prompt and its answer together."""
    device: torch.device
    """Where Transformers computes; vLLM chooses for itself."""
    dequantize: bool
    """With Transformers: unpack a packed model."""

    @property
    def settings(self) -> dict[str, str]:
        """What scores that are compared must have in common."""
        return {
            "backend": self.engine,
            "dtype": self.dtype,
            "max_length": str(self.max_length),
        }


@contextmanager
def open_runner(model: str, backend: Backend) -> Iterator[Runner]:
    """Load a Hub id, a folder or, with Transformers, a .gguf file.

    Raises:
        EvaluateError: it cannot be loaded, or the engine cannot be imported.
    """
    if backend.engine == "hf":
        from tacq_vllm.evaluate.transformers_runner import open_transformers

        yield open_transformers(
            model,
            _DTYPES[backend.dtype],
            backend.device,
            backend.max_length,
            dequantize=backend.dequantize,
        )
        return
    # Scores alone go to standard output. vLLM reads these when it is imported.
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    try:
        from tacq_vllm.evaluate.vllm_runner import open_vllm
    except ImportError as error:
        raise EvaluateError(
            f"--backend vllm: {error}: pip install 'tacq-vllm[cuda]', or on an x86 CPU "
            "'tacq-vllm[cpu]'"
        ) from error
    runner = open_vllm(model, backend.dtype, backend.max_length)
    try:
        yield runner
    finally:
        runner.close()
