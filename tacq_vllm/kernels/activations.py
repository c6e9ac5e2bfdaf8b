"""What the CPU kernels make of activations in 16 bits, as the environment chooses."""

import functools
import os

ACTIVATIONS_VARIABLE = "TACQ_CPU_ACTIVATIONS"


@functools.cache
def activations() -> str:
    """How x in 16 bits is multiplied: rounded (`int8`), or as it is (`exact`).

    Raises:
        ValueError: the environment has something else.
    """
    chosen = os.environ.get(ACTIVATIONS_VARIABLE, "int8")
    if chosen not in ("int8", "exact"):
        raise ValueError(f"{ACTIVATIONS_VARIABLE}={chosen}: int8 or exact is expected")
    return chosen
