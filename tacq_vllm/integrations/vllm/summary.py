"""The one line that a server logs about its checkpoint."""

from pathlib import Path

import torch

from tacq_vllm.format.layouts import stored_bytes
from tacq_vllm.format.schema import QuantizationSchema
from tacq_vllm.format.stored import StoredLinear
from tacq_vllm.integrations.vllm.errors import logger
from tacq_vllm.kernels.ops import kernel_name
from tacq_vllm.kernels.tiles import TiledLinear


class LoadSummary:
    """Counts the linears of a model; when the last has its weights, logs the line.

    vLLM tells a quantization method of each linear, but not when they are all there.
    """

    def __init__(self, schema: QuantizationSchema) -> None:
        self.checkpoint = "checkpoint"
        """Name of the folder or the repository."""
        self.has_experts = False
        """Whether the model has experts, which stay in 16 bits."""
        self._schema = schema
        self._waiting = 0
        self._nbytes = 0
        self._kernels: set[str] = set()

    def name(self, model: str) -> None:
        """Take the checkpoint's name from what the server was given."""
        self.checkpoint = Path(model).name if Path(model).is_dir() else model

    def expect_linear(self) -> None:
        """Note that a linear was made, whose weights are to come."""
        self._waiting += 1

    def add_linear(
        self, packed: StoredLinear | TiledLinear, x_dtype: torch.dtype
    ) -> None:
        """Note that a linear has its weights."""
        self._waiting -= 1
        self._nbytes += sum(tensor.nbytes for tensor in packed.tensors().values())
        self._kernels.add(kernel_name(packed, x_dtype))
        if self._waiting == 0:
            logger.info_once("tacq: %s", self._line(), scope="global")

    def _line(self) -> str:
        schema = self._schema
        size = schema.group_size
        nbytes = sum(stored_bytes(schema, name) for name in schema.linears)
        parts = [
            f"{schema.code_bits:.3g} bits",
            "whole rows" if size == -1 else f"group {size}",
            f"{100 * schema.outlier_ratio:.2f} % kept",
            f"{8 * nbytes / schema.num_weights:.2f} effective bits",
            f"kernel {' and '.join(sorted(self._kernels))}",
            f"{self._nbytes / 1e6:.1f} MB of weights",
        ]
        if self.has_experts:
            parts.append("experts not quantized")
        return f"{self.checkpoint}: {', '.join(parts)}"
