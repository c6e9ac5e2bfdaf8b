"""What the phases of a run depend on: the content of their fingerprints."""

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
import transformers

from tacq_vllm import __version__
from tacq_vllm.quantize.model import BaseModel
from tacq_vllm.quantize.world import World

Depends = dict[str, Any]
"""JSON values by name: two runs of a phase that agree in them give the same result."""


def common_depends(base: BaseModel, world: World) -> Depends:
    """What every phase depends on."""
    return {
        "model": base.fingerprint(),
        "device": base.device.type,
        "processes": world.size,
        "versions": {
            "tacq_vllm": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def digest(parts: Iterable[object]) -> str:
    """SHA-256 of a sequence: of bytes as they are, of all else by its `repr`."""
    total = hashlib.sha256()
    for part in parts:
        content = part if isinstance(part, bytes) else repr(part).encode()
        total.update(len(content).to_bytes(8, "little") + content)
    return total.hexdigest()
