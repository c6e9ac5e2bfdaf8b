"""Refusing, before the workers start, ranks that a checkpoint cannot be given to."""

from tacq_vllm.format.schema import QuantizationSchema
from tacq_vllm.integrations.vllm.building import config_in_the_making
from tacq_vllm.integrations.vllm.errors import refuse


def check_ranks(schema: QuantizationSchema) -> None:
    """Refuse a number of ranks that the checkpoint says it cannot be cut for.

    Where vLLM is not building its configuration, each linear checks its own cut.

    Raises:
        ValueError: naming the sizes that it can.
    """
    config, sizes = config_in_the_making(), schema.tensor_parallel_sizes
    if config is None:
        return
    if config.parallel_config.enable_elastic_ep:
        # A new rank is sent weights into dummy ones, whose tables have other sizes.
        refuse("--enable-elastic-ep is not supported: leave it out")
    size = int(config.parallel_config.tensor_parallel_size)
    if sizes is not None and size not in sizes:
        known = ", ".join(map(str, sizes)) or "no size at all"
        refuse(
            f"--tensor-parallel-size {size}: the linears of this checkpoint can be cut "
            f"for {known}; choose another size, or quantize with a smaller --group-size"
        )
