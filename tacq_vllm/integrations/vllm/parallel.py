"""Refusing a tensor-parallel size before the workers start."""

from tacq_vllm.format.schema import QuantizationSchema
from tacq_vllm.integrations.vllm.building import config_in_the_making
from tacq_vllm.integrations.vllm.errors import refuse


def check_tensor_parallel_size(schema: QuantizationSchema) -> None:
    """Refuse a number of ranks that the checkpoint says it cannot be cut for.

    Where vLLM is not building its configuration, each linear checks its own cut.

    Raises:
        ValueError: naming the sizes that it can.
    """
    config, sizes = config_in_the_making(), schema.tensor_parallel_sizes
    if config is None or sizes is None:
        return
    size = int(config.parallel_config.tensor_parallel_size)
    if size not in sizes:
        known = ", ".join(map(str, sizes)) or "no size at all"
        refuse(
            f"--tensor-parallel-size {size}: the linears of this checkpoint can be cut "
            f"for {known}; choose another size, or quantize with a smaller --group-size"
        )
