"""SPEC.md read by a stranger: a reader that uses nothing of the package."""

import json
import re
import struct
from pathlib import Path

import pytest
import torch

import tacq_vllm.format
from tacq_vllm.format.checkpoint import CheckpointReader, read_schema
from tacq_vllm.format.linear import linear_specs, pack_linear
from tacq_vllm.format.outliers import select_outliers
from tacq_vllm.format.validation import find_faults, load_linear
from tacq_vllm.kernels.reference import dequantize

SPEC = Path(tacq_vllm.format.__file__).with_name("SPEC.md")
FROZEN = Path(__file__).parents[1] / "data" / "frozen-v1"


def bfloat16(pattern: int) -> float:
    return struct.unpack("<f", struct.pack("<I", pattern << 16))[0]


def read_tensor(path: Path, name: str) -> tuple[list[int], list[int]]:
    """Shape and unsigned words of a stored tensor, from the raw file."""
    content = path.read_bytes()
    (size,) = struct.unpack_from("<Q", content)
    entry = json.loads(content[8 : 8 + size])[name]
    start, stop = (8 + size + offset for offset in entry["data_offsets"])
    letter = {"I32": "I", "BF16": "H"}[entry["dtype"]]
    width = struct.calcsize(letter)
    words = struct.unpack(f"<{(stop - start) // width}{letter}", content[start:stop])
    return entry["shape"], list(words)


def read_weight(path: Path, name: str, config: dict) -> list[list[float]]:
    """W as SPEC.md defines it, one number at a time."""
    out, in_ = config["linears"][name]
    bits = config["bits"]
    group = in_ if config["group_size"] == -1 else config["group_size"]
    groups = in_ // group
    width = 4 if bits == 4 else 2
    tensors = {
        part: read_tensor(path, f"{name}.{part}")
        for part in ("qweight", "scales", "qzeros", "outliers")
    }
    if bits == 3:
        for part in ("qweight_high", "qzeros_high"):
            tensors[part] = read_tensor(path, f"{name}.{part}")

    def code(row: int, column: int) -> int:
        def field(part: str, width: int) -> int:
            (_, words), values = tensors[part]
            per = 32 // width
            word = values[row * words + column // per]
            return (word >> (width * (column % per))) & (2**width - 1)

        low = field("qweight", width)
        return low + 4 * field("qweight_high", 1) if bits == 3 else low

    def zero(row: int, index: int) -> int:
        def field(part: str, width: int) -> int:
            per = 32 // width
            word = tensors[part][1][row // per * groups + index]
            return (word >> (width * (row % per))) & (2**width - 1)

        low = field("qzeros", width)
        return low + 4 * field("qzeros_high", 1) if bits == 3 else low

    weight = [
        [
            (code(r, k) - zero(r, k // group))
            * bfloat16(tensors["scales"][1][r * groups + k // group])
            for k in range(in_)
        ]
        for r in range(out)
    ]
    table = tensors["outliers"][1]
    for r in range(out):
        for entry in table[out + 1 + table[r] : out + 1 + table[r + 1]]:
            weight[r][entry & 0xFFFF] += bfloat16(entry >> 16)
    return weight


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


@pytest.fixture(params=["w2", "w3", "w4"])
def frozen(request) -> Path:
    return FROZEN / request.param


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
        bits = schema.bits
        spec_bits = (
            bits
            + 32 * schema.num_outliers(name) / (out * in_)
            + (16 + bits) / group
            + 32 * (out + 1) / (out * in_)
        )
        assert nbytes * 8 / (out * in_) == pytest.approx(spec_bits)
