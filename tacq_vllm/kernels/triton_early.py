"""Kernels that begin while the one before them still runs.

That is NVIDIA's programmatic dependent launch: such a kernel is started with
`launch_pdl`, lets the next one begin when it begins itself, and waits before it touches
what the one before has to do with.
"""

import torch
import triton
import triton.language as tl

from tacq_vllm.kernels.triton_device import major_capability


def can_be_early(device: torch.device) -> bool:
    """Whether a kernel can begin so: compute capability 9.0 or later."""
    return major_capability(device) >= 9


@triton.jit
def let_next_begin():
    """Let the next kernel begin where there is room, and load its weights."""
    tl.inline_asm_elementwise(
        "griddepcontrol.launch_dependents; // $0",
        "=r",
        [],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def wait_for_last():
    """Wait until the kernel before has ended: what it has written can be read."""
    tl.inline_asm_elementwise(
        "griddepcontrol.wait; // $0", "=r", [], dtype=tl.int32, is_pure=False, pack=1
    )
