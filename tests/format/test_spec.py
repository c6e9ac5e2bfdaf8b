"""SPEC.md and the package say the same."""

import json
import re
from pathlib import Path

import pytest
import torch

import tacq_vllm.format
from tacq_vllm.format.checkpoint import CheckpointReader, read_schema
from tacq_vllm.format.layouts import linear_specs
from tacq_vllm.format.linear import pack_linear
from tacq_vllm.format.outliers import select_outliers
from tacq_vllm.format.validation import find_faults, load_linear
from tacq_vllm.kernels.reference import dequantize
from tests.spec_reader import read_weight

SPEC = Path(tacq_vllm.format.__file__).with_name("SPEC.md")
DATA = Path(__file__).parents[1] / "data"


def test_the_worked_example():
    codes = (torch.arange(16) % 8).unsqueeze(0)
    codes[0, 4] = 3
    mask = torch.zeros(1, 16, dtype=torch.bool)
    mask[0, 4] = True
    kept = torch.full((1, 16), -1.25, dtype=torch.bfloat16)
    packed = pack_linear(
        codes,
        torch.tensor([[3]]),
        torch.tensor([[0.5]], dtype=torch.bfloat16),
        select_outliers(kept, mask),
        bits=3,
    )
    text = SPEC.read_text().split("## Worked example")[1]
    rows = dict(re.findall(r"\| `(\w+)` \| .*`0x([0-9A-F]+)` \|", text))
    for name, tensor in packed.tensors().items():
        last = tensor.flatten()[-1:].view(
            torch.int16 if tensor.dtype == torch.bfloat16 else torch.int32
        )
        mask_bits = 0xFFFF if tensor.dtype == torch.bfloat16 else 0xFFFFFFFF
        assert int(last) & mask_bits == int(rows[name], 16), name
    written = re.search(r"^W = (.*)$", text, re.MULTILINE)
    assert written is not None
    values = [float(value.strip("*")) for value in written[1].split()]
    assert dequantize(packed).flatten().tolist() == values


@pytest.fixture(
    params=["frozen-v1/w2", "frozen-v1/w3", "frozen-v1/w4", "frozen-v2/clusters"]
)
def frozen(request) -> Path:
    return DATA / request.param


def test_a_frozen_checkpoint_is_still_read(frozen):
    assert find_faults(frozen) == []
    config = json.loads((frozen / "config.json").read_text())["quantization_config"]
    schema = read_schema(frozen)
    expected = json.loads((frozen / "expected.json").read_text())
    with CheckpointReader(frozen) as reader:
        for name in schema.linears:
            ours = dequantize(load_linear(reader, schema, name))
            theirs = read_weight(frozen / "model.safetensors", name, config)
            assert torch.equal(ours, torch.tensor(theirs, dtype=torch.float32)), name
            assert ours.double().sum().item() == pytest.approx(expected[name], abs=1e-9)


def test_the_sizes_are_those_of_the_spec(frozen):
    schema = read_schema(frozen)
    for name, (out, in_) in schema.linears.items():
        nbytes = sum(spec.nbytes for spec in linear_specs(schema, name).values())
        group = in_ if schema.group_size == -1 else schema.group_size
        bits, zero_bits = schema.bits, schema.bits
        if schema.layout == "clusters":
            # Rows are padded to blocks.
            bits, zero_bits = 7 * 32 * -(-in_ // 96) / in_, 0
        spec_bits = (
            bits
            + 32 * schema.num_outliers(name) / (out * in_)
            + (16 + zero_bits) / group
            + 32 * (out + 1) / (out * in_)
        )
        assert nbytes * 8 / (out * in_) == pytest.approx(spec_bits)
