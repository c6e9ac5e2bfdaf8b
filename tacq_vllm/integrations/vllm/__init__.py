"""The vLLM plugin: `register` is the `vllm.general_plugins` entry point."""


def register() -> None:
    """Make vLLM know `--quantization tacq`.

    vLLM calls it in every process; importing the module registers it once.
    """
    import tacq_vllm.integrations.vllm.config  # noqa: F401
