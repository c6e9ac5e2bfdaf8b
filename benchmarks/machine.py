"""What the figures of a benchmark hold for."""

import torch
from cpuinfo import get_cpu_info

_INSTRUCTIONS = {
    "amx_int8": "AMX",
    "avx512_vnni": "AVX512-VNNI",
    "avx512bw": "AVX512",
    "avx2": "AVX2",
}
"""By their flags, the most capable first."""


def device_name(device: str, threads: int) -> str:
    """The GPU; or the processor, what it multiplies with, and how many threads do.

    Args:
        device: what is measured, `cuda` or `cpu`.
        threads: of a processor.
    """
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = get_cpu_info()
    known = (name for flag, name in _INSTRUCTIONS.items() if flag in info["flags"])
    return f"{info['brand_raw']} ({next(known, 'no AVX2')}), {threads} threads"
