"""The plugin's lines in vLLM's log; one of them when something cannot be served."""

from typing import NoReturn

from vllm.logger import init_logger

# Under vLLM's own logger, so that lines look and go like vLLM's others.
logger = init_logger(f"vllm.{__name__}")


def refuse(reason: object) -> NoReturn:
    """Log the reason as one line that begins `tacq:`, and stop.

    Raises:
        ValueError: always.
    """
    logger.error("tacq: %s", reason)
    raise ValueError(f"tacq: {reason}")
