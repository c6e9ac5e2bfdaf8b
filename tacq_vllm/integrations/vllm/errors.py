"""One clear line when vLLM is given something that cannot be served."""

from typing import NoReturn

from vllm.logger import init_logger

# Under vLLM's own logger, so that the line looks and goes like vLLM's others.
logger = init_logger(f"vllm.{__name__}")


def refuse(reason: object) -> NoReturn:
    """Log the reason as one line that begins `tacq:`, and stop.

    Raises:
        ValueError: always.
    """
    logger.error("tacq: %s", reason)
    raise ValueError(f"tacq: {reason}")
