"""How much memory training takes, on a model of some size."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tacq_vllm.config import StorageDtype
from tacq_vllm.convert.folder import copy_companions, write_config
from tacq_vllm.format.checkpoint import CheckpointReader, CheckpointWriter
from tacq_vllm.format.json_object import read_json
from tacq_vllm.format.linear import pack_linear
from tacq_vllm.format.outliers import select_outliers
from tacq_vllm.format.schema import DEFAULT_CIRCUIT, QuantizationSchema, storage_dtype
from tacq_vllm.format.validation import find_faults
from tests.conftest import SIZES, save_random

HIDDEN, BLOCKS = 512, 16
GROUP, MAX_CODE = 128, 3
DTYPE: StorageDtype = "bfloat16"

MEASURED = """
import json, sys
from pathlib import Path
import torch
from tacq_vllm.quantize.progress import Progress
from tacq_vllm.quantize.workdir import WorkDir
from tacq_vllm.recover.config import load_recover_config
from tacq_vllm.recover.pipeline import recover_checkpoint

torch.set_num_threads(1)

def memory(field):
    # Not getrusage: its peak includes that of the process that started this one.
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(field))
    return int(line.split()[1]) * 1024

def train(checkpoint, base, output):
    recover_checkpoint(
        Path(checkpoint), base, load_recover_config(Path(sys.argv[1])), Path(output),
        torch.device("cpu"), WorkDir(Path(output + ".work")), Progress(),
        lambda folder, schema: None,
    )

# All that is imported on the way belongs to the imports.
train(*sys.argv[2:5])
before = memory("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
train(*sys.argv[5:8])
print(json.dumps({"before": before, "peak": memory("VmHWM")}))
"""


@pytest.fixture(scope="module")
def large_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 51 million weights, of which a linear has a hundredth."""
    config = LlamaConfig(
        **SIZES
        | {
            "hidden_size": HIDDEN,
            "intermediate_size": 1408,
            "num_hidden_layers": BLOCKS,
            "initializer_range": 0.02,
        }
    )
    return save_random(config, tmp_path_factory.mktemp("large") / "model")


def round_to_nearest(model: Path, output: Path) -> None:
    """A checkpoint of 2 bits, none kept, without any calibration."""
    dense = LlamaForCausalLM.from_pretrained(model, dtype=torch.float32)
    linears = {
        name: module.weight.detach()
        for name, module in dense.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }
    output.mkdir()
    writer = CheckpointWriter(output, 10**9)
    for name, weight in linears.items():
        grouped = weight.view(weight.shape[0], -1, GROUP)
        low, high = grouped.amin(2).clamp(max=0), grouped.amax(2).clamp(min=0)
        scales = ((high - low) / MAX_CODE).to(storage_dtype(DTYPE))
        zeros = (-low / scales).round().clamp(0, MAX_CODE)
        codes = grouped / scales.unsqueeze(2) + zeros.unsqueeze(2)
        packed = pack_linear(
            codes.round().clamp(0, MAX_CODE).to(torch.uint8).flatten(1),
            zeros.to(torch.uint8),
            scales,
            select_outliers(
                weight.bfloat16(), torch.zeros_like(weight, dtype=torch.bool)
            ),
            2,
        )
        for suffix, tensor in packed.tensors().items():
            writer.add(f"{name}.{suffix}", tensor)
    with CheckpointReader(model) as reader:
        for name in reader:
            if name.removesuffix(".weight") not in linears:
                writer.add(name, reader.load(name))
    writer.close()
    copy_companions(model, output)
    schema = QuantizationSchema(
        bits=2,
        group_size=GROUP,
        dtype=DTYPE,
        linears={name: tuple(weight.shape) for name, weight in linears.items()},
        circuits={DEFAULT_CIRCUIT: dict.fromkeys(linears, 0)},
    )
    block = {"quantization_config": schema.model_dump(mode="json")}
    write_config(output, read_json(model / "config.json") | block)
    assert find_faults(output) == []


def test_training_takes_little_more_than_the_16_bit_weights(
    large_model: Path,
    tiny_model: Path,
    tiny_checkpoint: Path,
    text_file: Path,
    tmp_path: Path,
):
    round_to_nearest(large_model, tmp_path / "checkpoint")
    recipe = tmp_path / "recipe.yaml"
    choices = {
        "calibration": {"sources": [str(text_file)], "num_samples": 3, "seq_len": 32},
        "budget": 1,
        "budget_unit": "steps",
        "batch_tokens": 32,
        "precision": "fp32",
    }
    recipe.write_text(json.dumps(choices))
    small = (tiny_checkpoint, tiny_model, tmp_path / "small")
    large = (tmp_path / "checkpoint", large_model, tmp_path / "large")

    result = subprocess.run(
        [sys.executable, "-c", MEASURED, *map(str, (recipe, *small, *large))],
        capture_output=True,
        text=True,
        # With a threshold malloc gives back what is freed.
        env=os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"},
        check=False,
    )

    assert result.returncode == 0, result.stderr
    figures = json.loads(result.stdout)
    with CheckpointReader(large_model) as reader:
        weights = reader.file_bytes
    # Activations of 32 tokens are few.
    taken = (figures["peak"] - figures["before"]) / weights
    print(f"{taken:.2f} x {weights / 1e6:.0f} MB")
    assert taken < 1.6
