"""Random linears and inputs, samples, commands, and damaged checkpoints."""

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tacq_vllm.format.checkpoint import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    CheckpointReader,
    CheckpointWriter,
    read_schema,
)
from tacq_vllm.format.linear import PackedLinear, pack_linear
from tacq_vllm.format.outliers import select_outliers
from tacq_vllm.format.validation import load_linear
from tacq_vllm.kernels.reference import dequantize

Change = Callable[[dict[str, Tensor]], None]
"""What changes tensors of a checkpoint, by name, in place."""


def random_input(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Activations, the same for each shape."""
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(dtype)


def random_mask(
    shape: tuple[int, int], density: float, generator: torch.Generator, rows: slice
) -> Tensor:
    """A share of the weights of some rows: bool [out, in]."""
    mask = torch.zeros(shape, dtype=torch.bool)
    mask[rows] = torch.rand(mask[rows].shape, generator=generator) < density
    return mask


def random_linear(
    bits: int,
    out_features: int,
    in_features: int,
    group_size: int,
    density: float,
    dtype: torch.dtype,
    seed: int,
    outlier_rows: slice = slice(None),
) -> tuple[PackedLinear, Tensor]:
    """A packed linear and its dense weight, float64 [out, in].

    Codes at kept weights are random too: the two parts are added, whatever they are.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (out_features, in_features)
    size = in_features if group_size == -1 else group_size
    grid_shape = (out_features, in_features // size)
    codes = torch.randint(2**bits, shape, generator=generator)
    zeros = torch.randint(2**bits, grid_shape, generator=generator)
    scales = (torch.rand(grid_shape, generator=generator) * 0.1 + 0.01).to(dtype)
    values = torch.randn(shape, generator=generator).to(dtype)
    mask = random_mask(shape, density, generator, outlier_rows)

    steps = codes - zeros.repeat_interleave(size, dim=1)
    dense = steps * scales.double().repeat_interleave(size, dim=1)
    dense[mask] += values[mask].double()
    packed = pack_linear(codes, zeros, scales, select_outliers(values, mask), bits)
    return packed, dense


def kept_ones(out_features: int, in_features: int) -> PackedLinear:
    """A linear whose weights are all kept, and 1."""
    shape = (out_features, in_features)
    zeros, ones = torch.zeros(shape, dtype=torch.uint8), torch.ones(shape)
    values = ones.bfloat16()
    outliers = select_outliers(values, ones.bool())
    return pack_linear(zeros, zeros[:, :1], values[:, :1], outliers, bits=2)


def assert_is_product(
    out: Tensor, x: Tensor, dense: Tensor, bias: Tensor | None = None
) -> None:
    """Compare with x @ dense.T + bias in float64.

    The error is measured against the sum and the size it has without cancellation.
    """
    expected = x.double() @ dense.T
    size = (x.double().square() @ dense.square().T).sqrt()
    if bias is not None:
        expected += bias.double()
        size += bias.double().abs()
    assert out.dtype == x.dtype
    assert out.shape == expected.shape
    tolerance = 1e-5 if x.dtype == torch.float32 else 1e-2
    bound = tolerance * (size + expected.abs())
    assert bool(((out.double() - expected).abs() <= bound).all())


def write_lines(path: Path, rows: Iterable[Any]) -> None:
    """Write JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def quantize_arguments(
    model: Path, output: Path, *sources: str | Path, **options: object
) -> list[str]:
    """What asks the command line for a small run on the CPU."""
    small = {"group_size": 32, "num_samples": 2, "seq_len": 32, "device": "cpu"}
    parts: list[object] = ["quantize", model, "--output", output]
    for name, value in (small | options).items():
        parts += [f"--{name.replace('_', '-')}", value]
    for source in sources:
        parts += ["--calibration", source]
    return [str(part) for part in parts]


def rewrite_tensors(folder: Path, change: Change) -> None:
    """Change the tensors of a checkpoint of one shard."""
    path = folder / WEIGHTS_NAME
    tensors = load_file(path)
    change(tensors)
    # The loaded tensors may be mapped from the file that is replaced.
    temporary = path.with_suffix(".new")
    save_file(tensors, temporary, metadata={"format": "pt"})
    temporary.replace(path)


def save_sharded(source: Path, folder: Path) -> Path:
    """Write a checkpoint of one shard anew, in several; give its folder."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns(WEIGHTS_NAME))
    writer = CheckpointWriter(folder, max_shard_bytes=20_000)
    for name, tensor in load_file(source / WEIGHTS_NAME).items():
        writer.add(name, tensor)
    writer.close()
    return folder


def stored_weights(folder: Path) -> dict[str, Tensor]:
    """Each quantized linear of a checkpoint, dequantized: float32 [out, in] by name."""
    schema = read_schema(folder)
    with CheckpointReader(folder) as reader:
        linears = {name: load_linear(reader, schema, name) for name in schema.linears}
        return {name: dequantize(linear) for name, linear in linears.items()}


def remove(name: str) -> Change:
    """A change that removes a tensor."""

    def change(tensors: dict[str, Tensor]) -> None:
        del tensors[name]

    return change


def replace(name: str, new: Callable[[Tensor], Tensor]) -> Change:
    """A change that makes a tensor another."""

    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name] = new(tensors[name])

    return change


def put(index: int, value: float) -> Callable[[Tensor], Tensor]:
    """What gives a copy of a tensor with another value at a flat index."""

    def change(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[index] = value
        return tensor

    return change


def rewrite_schema(folder: Path, **fields: Any) -> None:
    """Change fields of a checkpoint's quantization block."""
    path = folder / CONFIG_NAME
    config = json.loads(path.read_text())
    config["quantization_config"] |= fields
    path.write_text(json.dumps(config))


def truncate(path: Path, count: int = 1) -> None:
    """Cut bytes off the end of a file."""
    path.write_bytes(path.read_bytes()[:-count])
