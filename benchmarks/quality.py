"""Perplexity of GPTQ and TaCQ beside the 16-bit model, on the same text.

    python benchmarks/quality.py MODEL --train TRAIN.txt.gz --test TEST.txt.gz \
        --settings 3x64,2x64,3x-1 --output RESULTS.json

Calibration: 64 windows of 512 tokens of the training text. Perplexity: the first 24
windows of 1024 tokens of the test text, in float32. A setting is BITSxGROUP_SIZE.
Results are added to the file as they come.
"""

import argparse
import json
import math
import platform
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

import tacq_vllm.integrations.transformers  # noqa: F401 - registers the format
from tacq_vllm.config import Recipe, override_recipe
from tacq_vllm.format.inspection import inspect_checkpoint
from tacq_vllm.quantize.calibration import read_tokens
from tacq_vllm.quantize.model import load_base_model
from tacq_vllm.quantize.pipeline import quantize_model
from tacq_vllm.quantize.progress import Progress
from tacq_vllm.quantize.workdir import open_workdir

WINDOWS, WINDOW = 24, 1024


def main() -> None:
    """Quantize and measure every setting."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--train", required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--settings", default="3x64,2x64,3x-1")
    parser.add_argument("--methods", default="gptq,tacq")
    parser.add_argument("--kept-value", default="compensated")
    parser.add_argument("--no-activation-order", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()

    base = load_base_model(arguments.model, torch.device("cpu"))
    tokens = read_tokens(base.tokenizer, arguments.test)
    machine = {
        "model": base.name,
        "cpu_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }
    report(
        arguments.output, machine | {"bits": 16, "ppl": perplexity(base.model, tokens)}
    )
    for setting in arguments.settings.split(","):
        bits, group_size = map(int, setting.split("x"))
        for method in arguments.methods.split(","):
            recipe = override_recipe(
                Recipe(),
                {
                    "method": method,
                    "bits": bits,
                    "group_size": group_size,
                    "calibration.sources": [arguments.train],
                    "calibration.num_samples": 64,
                    "calibration.seq_len": 512,
                    "calibration.seed": arguments.seed,
                    "outliers.kept_value": arguments.kept_value,
                    "gptq.activation_order": not arguments.no_activation_order,
                },
            )
            progress = Progress()
            with tempfile.TemporaryDirectory() as folder, open_workdir(None) as workdir:
                output = Path(folder) / "checkpoint"
                quantize_model(
                    base, recipe, output, workdir, progress, lambda staged, schema: None
                )
                effective_bits = inspect_checkpoint(output).effective_bits
                model = AutoModelForCausalLM.from_pretrained(
                    output, dtype=torch.float32
                ).dequantize()
                result = {
                    "method": method,
                    "bits": bits,
                    "group_size": group_size,
                    "seed": arguments.seed,
                    "kept_value": arguments.kept_value,
                    "activation_order": not arguments.no_activation_order,
                    "effective_bits": effective_bits,
                    "ppl": perplexity(model, tokens),
                    "seconds": progress.seconds,
                    "peak_bytes": peak_bytes(),
                }
            report(arguments.output, machine | result)


@torch.no_grad()
def perplexity(model: Any, tokens: torch.Tensor) -> float:
    """Exponential of the mean cross-entropy over non-overlapping windows."""
    losses = []
    for window in tokens[: WINDOWS * WINDOW].view(WINDOWS, 1, WINDOW):
        losses.append(float(model(window, labels=window).loss))
    return math.exp(sum(losses) / len(losses))


def peak_bytes() -> int:
    """Largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def report(path: Path, row: dict[str, Any]) -> None:
    """Add a row to the results file and print it."""
    rows = json.loads(path.read_text()) if path.is_file() else []
    path.write_text(json.dumps([*rows, row], indent=1) + "\n")
    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
