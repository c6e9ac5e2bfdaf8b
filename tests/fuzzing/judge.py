"""What a reader may make of a checkpoint: refuse it, or read what SPEC.md says."""

import json
from pathlib import Path

import torch

from tacq_vllm.format.checkpoint import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    CheckpointReader,
    read_schema,
)
from tacq_vllm.format.validation import find_faults, load_linear
from tacq_vllm.kernels.reference import dequantize
from tests.spec_reader import read_weight


def judge(folder: Path) -> bool:
    """Whether a checkpoint was accepted; then both readers read the same.

    Raises:
        AssertionError: they do not, or a fault is not one line.
        Exception: whatever a reader should not have raised.
    """
    faults = find_faults(folder)
    if faults:
        assert all(fault.isprintable() for fault in faults), faults
        return False
    schema = read_schema(folder)
    block = json.loads((folder / CONFIG_NAME).read_text())["quantization_config"]
    with CheckpointReader(folder) as reader:
        for name in schema.linears:
            ours = dequantize(load_linear(reader, schema, name))
            theirs = torch.tensor(read_weight(folder / WEIGHTS_NAME, name, block))
            assert bool(ours.isfinite().all()), name
            assert torch.equal(ours, theirs), name
    return True
