"""Checkpoints of other formats, made of a model in 16 bits."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from tacq_vllm.format.checkpoint import CONFIG_NAME, WEIGHTS_NAME
from tests.conftest import make_tokenizer


def pack_stream(values: Tensor, bits: int) -> Tensor:
    """Write integers [n, m] as m streams of bits, lowest first: int32 [words, m]."""
    columns = []
    for column in values.T.tolist():
        stream = sum(value << (bits * index) for index, value in enumerate(column))
        count = -(-len(column) * bits // 32)
        words = [(stream >> (32 * index)) & 0xFFFFFFFF for index in range(count)]
        columns.append([word - (word >> 31 << 32) for word in words])
    return torch.tensor(columns, dtype=torch.int32).T.contiguous()


def pack_zeros(zeros: Tensor, bits: int, version: int) -> Tensor:
    """Write zero-points [out, groups] as either format has them."""
    if version == 2:
        return pack_stream(zeros, bits).T.contiguous()
    if bits == 3:
        return pack_stream((zeros - 1) % 8, bits).T.contiguous()
    ones = sum(1 << shift for shift in range(0, 32, bits))
    words = pack_stream(zeros, bits).to(torch.int64) - ones
    return words.to(torch.int32).T.contiguous()


def gptq_tensors(
    codes: Tensor, zeros: Tensor, scales: Tensor, bits: int, version: int
) -> dict[str, Tensor]:
    """The tensors of a linear, W = (codes - zeros) · scales; codes are [out, in]."""
    group_size = codes.shape[1] // zeros.shape[1]
    return {
        "qweight": pack_stream(codes.T, bits),
        "qzeros": pack_zeros(zeros, bits, version),
        "scales": scales.T.contiguous(),
        "g_idx": torch.arange(codes.shape[1], dtype=torch.int32) // group_size,
    }


def round_weight(
    weight: Tensor, bits: int, group_size: int, sym: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [out, in], zero-points and float16 scales [out, groups] near a weight."""
    groups = weight.float().unflatten(1, (-1, group_size))
    low, high = groups.amin(-1), groups.amax(-1)
    top = 2**bits - 1
    if sym:
        scales = (2 * groups.abs().amax(-1) / top).half()
        zeros = torch.full(scales.shape, 2 ** (bits - 1))
    else:
        scales = ((high - low) / top).half()
        zeros = (-low / scales).round().clamp(0, top).long()
    codes = (groups / scales.float().unsqueeze(-1)).round() + zeros.unsqueeze(-1)
    return codes.clamp(0, top).long().flatten(1), zeros, scales


def block_linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """The linears of a model's blocks."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            yield name, module


def save_gptq(
    base: Path, folder: Path, bits: int, group_size: int, sym: bool, version: int
) -> PreTrainedModel:
    """Save a model as a GPTQ checkpoint; give it in float32 with its weights."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    tensors = load_file(base / WEIGHTS_NAME)
    for name, linear in block_linears(model):
        size = linear.in_features if group_size == -1 else group_size
        weight = tensors.pop(f"{name}.weight")
        codes, zeros, scales = round_weight(weight, bits, size, sym)
        packed = gptq_tensors(codes, zeros, scales, bits, version)
        tensors |= {f"{name}.{suffix}": tensor for suffix, tensor in packed.items()}
        steps = (codes - zeros.repeat_interleave(size, 1)).float()
        linear.weight.data = steps * scales.float().repeat_interleave(size, 1)
    folder.mkdir()
    save_file(tensors, folder / WEIGHTS_NAME, metadata={"format": "pt"})
    make_tokenizer().save_pretrained(folder)
    block = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group_size,
        "sym": sym,
        "desc_act": False,
        "checkpoint_format": "gptq" if version == 1 else "gptq_v2",
    }
    config = json.loads((base / CONFIG_NAME).read_text())
    config["quantization_config"] = block
    (folder / CONFIG_NAME).write_text(json.dumps(config))
    return model


def rewrite_config(folder: Path, **fields: Any) -> None:
    """Change fields of a checkpoint's configuration."""
    config = json.loads((folder / CONFIG_NAME).read_text())
    (folder / CONFIG_NAME).write_text(json.dumps(config | fields))


def rewrite_block(folder: Path, **fields: Any) -> None:
    """Change fields of a checkpoint's quantization_config; None removes one."""
    config = json.loads((folder / CONFIG_NAME).read_text())
    block = config["quantization_config"] | fields
    block = {key: value for key, value in block.items() if value is not None}
    rewrite_config(folder, quantization_config=block)
