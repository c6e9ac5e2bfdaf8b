"""Refusing a tensor-parallel size before the workers start."""

import inspect

from vllm.config import VllmConfig

from tacq_vllm.format.schema import QuantizationSchema
from tacq_vllm.integrations.vllm.errors import refuse


def check_tensor_parallel_size(schema: QuantizationSchema) -> None:
    """Refuse a number of ranks that the checkpoint says it cannot be cut for."""
    size = _tensor_parallel_size()
    sizes = schema.tensor_parallel_sizes
    if size is not None and sizes is not None and size not in sizes:
        known = ", ".join(map(str, sizes)) or "no size at all"
        refuse(
            f"--tensor-parallel-size {size}: the linears of this checkpoint can be cut "
            f"for {known}; choose another size, or quantize with a smaller --group-size"
        )


def _tensor_parallel_size() -> int | None:
    """The size asked for, where vLLM is making its configuration; else None.

    vLLM shows its quantization methods no parallel configuration before they are in the
    workers, so this looks at who is calling. Elsewhere each linear checks its own cut.
    """
    frame = inspect.currentframe()
    while frame is not None:
        owner = frame.f_locals.get("self")
        if frame.f_code.co_name == "__post_init__" and isinstance(owner, VllmConfig):
            return int(owner.parallel_config.tensor_parallel_size)
        frame = frame.f_back
    return None
