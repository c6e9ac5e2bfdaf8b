"""Bytes as a list of changes of a small, good checkpoint."""

import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from transformers import LlamaConfig

from tacq_vllm.format.checkpoint import CONFIG_NAME, WEIGHTS_NAME, CheckpointWriter
from tacq_vllm.format.schema import FORMAT_VERSIONS, LayoutName, QuantizationSchema
from tests.builders import random_linear
from tests.clusters import random_clustered

SIZE, ROWS, KEPT = 16, 16, 0.1
STEP_BYTES = 8
MAX_STEPS = 8
NUMBERS = (0, 1, -1, 2, 3, 15, 16, 17, 255, 65535, 65536, 2**31 - 1, 2**31, 2**63)
NUMBERS += (2**64, -(2**31), 10**30)
WORDS = (0x0000_0000, 0x7F80_7F80, 0xFFFF_FFFF, 0x8000_0000, 0x7FC0_0001, 0x0001_FFFF)


@dataclass(frozen=True)
class Files:
    """The bytes of a checkpoint of one file."""

    config: bytes
    header: bytes
    data: bytes

    def write(self, folder: Path) -> None:
        """Store them; the header's length is told as it is."""
        weights = struct.pack("<Q", len(self.header)) + self.header + self.data
        (folder / CONFIG_NAME).write_bytes(self.config)
        (folder / WEIGHTS_NAME).write_bytes(weights)


def make_files(folder: Path, layout: LayoutName) -> Files:
    """A Llama of one block, 3 bits or clusters, as small as can be."""
    config = LlamaConfig(
        hidden_size=SIZE,
        intermediate_size=ROWS,
        num_hidden_layers=1,
        num_attention_heads=1,
        head_dim=SIZE,
        vocab_size=4,
        tie_word_embeddings=True,
        architectures=["LlamaForCausalLM"],
    )
    block, norms = "model.layers.0", ("input_layernorm", "post_attention_layernorm")
    parts = [f"self_attn.{x}_proj" for x in "qkvo"]
    parts += [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
    make = random_clustered if layout == "clusters" else partial(random_linear, 3)
    writer, counts = CheckpointWriter(folder, 10**9), {}
    for seed, name in enumerate(f"{block}.{part}" for part in parts):
        packed, _ = make(ROWS, SIZE, -1, KEPT, torch.bfloat16, seed)
        for suffix, tensor in packed.tensors().items():
            writer.add(f"{name}.{suffix}", tensor)
        counts[name] = packed.outliers.numel() - ROWS - 1
    ones = torch.ones(SIZE, dtype=torch.bfloat16)
    for name in (*(f"{block}.{norm}" for norm in norms), "model.norm"):
        writer.add(f"{name}.weight", ones.clone())
    writer.add("model.embed_tokens.weight", ones.repeat(4, 1))
    writer.close()
    schema = QuantizationSchema(
        format_version=FORMAT_VERSIONS[layout],
        layout=layout,
        bits=2 if layout == "clusters" else 3,
        group_size=-1,
        dtype="bfloat16",
        linears=dict.fromkeys(counts, (ROWS, SIZE)),
        circuits={"default": counts},
    )
    config.quantization_config = schema.model_dump(mode="json")
    config.save_pretrained(folder)
    weights = (folder / WEIGHTS_NAME).read_bytes()
    end = 8 + int.from_bytes(weights[:8], "little")
    return Files((folder / CONFIG_NAME).read_bytes(), weights[8:end], weights[end:])


def mutate(files: Files, program: bytes) -> Files:
    """Apply up to `MAX_STEPS` changes, each told by `STEP_BYTES` bytes."""
    parts = [files.config, files.header, files.data]
    stop = min(len(program), MAX_STEPS * STEP_BYTES) - STEP_BYTES + 1
    for start in range(0, stop, STEP_BYTES):
        part, kind, place, value, length = struct.unpack_from("<BBHHH", program, start)
        change = CHANGES[kind % len(CHANGES)]
        index = part % len(parts)
        parts[index] = change(parts[index], place, value, length)
    return Files(*parts)


def _flip(content: bytes, place: int, value: int, length: int) -> bytes:
    if not content:
        return content
    at = place % len(content)
    return content[:at] + bytes([content[at] ^ (1 << value % 8)]) + content[at + 1 :]


def _word(content: bytes, place: int, value: int, length: int) -> bytes:
    at = place % max(len(content) // 4, 1) * 4
    word = struct.pack("<I", WORDS[value % len(WORDS)])
    return content[:at] + word + content[at + 4 :]


def _step(content: bytes, place: int, value: int, length: int) -> bytes:
    """Add a little to a word: offsets and columns that are nearly right."""
    at = place % max(len(content) // 4, 1) * 4
    if at + 4 > len(content):
        return content
    (word,) = struct.unpack_from("<I", content, at)
    word = (word + value % 7 - 3) % 2**32
    return content[:at] + struct.pack("<I", word) + content[at + 4 :]


def _cut(content: bytes, place: int, value: int, length: int) -> bytes:
    at = place % (len(content) + 1)
    return content[:at] + content[at + length % 64 :]


def _repeat(content: bytes, place: int, value: int, length: int) -> bytes:
    at, end = place % (len(content) + 1), value % (len(content) + 1)
    return content[:at] + content[end : end + length % 256] + content[at:]


def _truncate(content: bytes, place: int, value: int, length: int) -> bytes:
    return content[: place % (len(content) + 1)]


def _number(content: bytes, place: int, value: int, length: int) -> bytes:
    """Put another number where one is."""
    found = list(re.finditer(rb"-?\d+", content))
    if not found:
        return content
    match = found[place % len(found)]
    number = str(NUMBERS[value % len(NUMBERS)]).encode()
    return content[: match.start()] + number + content[match.end() :]


def _swap(content: bytes, place: int, value: int, length: int) -> bytes:
    """Put a string, a number or a list in the place of another."""
    pattern = rb'"[^"]*"' if length % 2 else rb"\[[^\[\]]*\]|-?\d+"
    found = list(re.finditer(pattern, content))
    if not found:
        return content
    match, other = found[place % len(found)], found[value % len(found)]
    return content[: match.start()] + other[0] + content[match.end() :]


CHANGES: tuple[Callable[[bytes, int, int, int], bytes], ...] = (
    _flip,
    _word,
    _step,
    _cut,
    _repeat,
    _truncate,
    _number,
    _swap,
)
