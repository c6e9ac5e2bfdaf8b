"""Perplexity and task loss of quantized models beside the 16-bit one, on equal text.

    python benchmarks/quality.py MODEL --data-root DIR --settings 3x64,2x64,3x-1 \
        --methods gptq,tacq --seeds 0,1,2 --output RESULTS.json

Calibration: 64 windows of 512 tokens, or as many tokens of a task's samples.
Scores, in float32: WikiText-2 perplexity over the first 24 windows of 1024 tokens of
the test text; for gsm8k and spider the mean loss on the tokens of the answers, over
evaluation items spread evenly. A setting is BITSxGROUP_SIZE. A method is gptq, or a
saliency with which weights are kept. Cells that the results file holds already are not
run again; gradients and plain passes are shared through the work folder. At the end
the file's means are printed as a table.
"""

import argparse
import json
import math
import platform
import resource
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import transformers
import yaml
from torch import Tensor
from transformers import AutoModelForCausalLM

import tacq_vllm.integrations.transformers  # noqa: F401 - registers the format
from tacq_vllm.config import Recipe, override_recipe
from tacq_vllm.data.sets import load_named_set
from tacq_vllm.format.inspection import inspect_checkpoint
from tacq_vllm.quantize.model import BaseModel, open_base_model
from tacq_vllm.quantize.pipeline import quantize_model
from tacq_vllm.quantize.progress import Progress
from tacq_vllm.quantize.workdir import WorkDir

WINDOWS, WINDOW = 24, 1024


@dataclass(frozen=True)
class Cell:
    """One quantized model of the matrix."""

    method: str
    bits: int
    group_size: int
    calibration: str
    seed: int
    options: str
    """Recipe fields changed beyond that, as `field=value` joined by spaces."""

    def recipe(self) -> Recipe:
        """The recipe that makes it."""
        fields: dict[str, Any] = {
            "method": "gptq" if self.method == "gptq" else "tacq",
            "outliers.saliency": None if self.method == "gptq" else self.method,
            "bits": self.bits,
            "group_size": self.group_size,
            "calibration.sources": [self.calibration],
            "calibration.num_samples": 64,
            "calibration.seq_len": 512,
            "calibration.seed": self.seed,
        }
        for option in self.options.split():
            name, _, value = option.partition("=")
            fields[name] = yaml.safe_load(value)
        return override_recipe(Recipe(), fields)


def main() -> None:
    """Quantize and measure every cell of the matrix."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--data-root", type=Path, help="named sets; without: the Hub")
    parser.add_argument("--settings", default="3x64,2x64,3x-1")
    parser.add_argument("--methods", default="gptq,tacq")
    parser.add_argument("--calibration", default="wikitext2")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--options", nargs="*", default=[], metavar="FIELD=VALUE")
    parser.add_argument("--tasks", default="wikitext2")
    parser.add_argument("--items", type=int, default=40, help="of each task")
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()

    workdir = WorkDir(arguments.work_dir)
    base = open_base_model(arguments.model, torch.device("cpu"), workdir)
    texts = {
        task: list(evaluation_texts(base, task, arguments.data_root, arguments.items))
        for task in arguments.tasks.split(",")
    }
    machine = {
        "model": base.name,
        "cpu_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }
    rows = read_rows(arguments.output)
    if not any(row["method"] == "16-bit" for row in rows):
        with base.resident() as model:
            row = {"method": "16-bit", "scores": score(model, texts)}
        report(arguments.output, machine | row)
    axes = (arguments.settings, arguments.calibration, arguments.methods)
    for seed, *cell in product(
        map(int, arguments.seeds.split(",")), *(axis.split(",") for axis in axes)
    ):
        setting, calibration, method = cell
        bits, group_size = map(int, setting.split("x"))
        options = " ".join(arguments.options)
        wanted = Cell(method, bits, group_size, calibration, seed, options)
        if any(row.items() >= vars(wanted).items() for row in rows):
            continue
        row = run(base, wanted, texts, workdir, arguments.data_root)
        report(arguments.output, machine | row)
    print_table(read_rows(arguments.output))


def run(
    base: BaseModel,
    cell: Cell,
    texts: dict[str, list[tuple[Tensor, int]]],
    workdir: WorkDir,
    data_root: Path | None,
) -> dict[str, Any]:
    """Quantize one cell and measure it."""
    progress = Progress()
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "checkpoint"
        quantize_model(
            base,
            cell.recipe(),
            output,
            workdir,
            progress,
            lambda staged, schema: None,
            data_root,
        )
        model = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
        return vars(cell) | {
            "effective_bits": inspect_checkpoint(output).effective_bits,
            "scores": score(model.dequantize(), texts),
            "seconds": progress.seconds,
            "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }


def evaluation_texts(
    base: BaseModel, task: str, data_root: Path | None, items: int
) -> Iterator[tuple[Tensor, int]]:
    """Token samples of a task's evaluation split, with the first token that counts."""
    named = load_named_set(task, "evaluation", data_root)
    if named.documents:
        ids = base.tokenizer("".join(named.documents)).input_ids
        for window in torch.tensor(ids[: WINDOWS * WINDOW]).view(WINDOWS, WINDOW):
            yield window, 1
        return
    for item in named.items[:: max(1, len(named.items) // items)][:items]:
        prompt = base.tokenizer(item.prompt).input_ids
        whole = base.tokenizer(item.prompt + item.completion).input_ids
        yield torch.tensor(whole), len(prompt)


@torch.no_grad()
def score(model: Any, texts: dict[str, list[tuple[Tensor, int]]]) -> dict[str, float]:
    """WikiText-2 perplexity, and the mean loss of answers by task."""
    scores = {}
    for task, samples in texts.items():
        losses = []
        for tokens, start in samples:
            logits = model(tokens[None]).logits[0, start - 1 : -1].float()
            losses.append(
                float(torch.nn.functional.cross_entropy(logits, tokens[start:]))
            )
        is_text = task == "wikitext2"
        scores[f"{task} ppl" if is_text else f"{task} loss"] = (
            math.exp(mean(losses)) if is_text else mean(losses)
        )
    return scores


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows measured so far."""
    return json.loads(path.read_text()) if path.is_file() else []


def report(path: Path, row: dict[str, Any]) -> None:
    """Add a row to the results file and print it."""
    path.write_text(json.dumps([*read_rows(path), row], indent=1) + "\n")
    print(json.dumps(row), flush=True)


def print_table(rows: list[dict[str, Any]]) -> None:
    """Print the mean of every cell over its seeds."""
    cells = defaultdict(list)
    for row in rows:
        if row["method"] == "16-bit":
            print(f"16-bit: {row['scores']}")
            continue
        group = "row" if row["group_size"] == -1 else str(row["group_size"])
        setting = (row["bits"], group, row["calibration"], row["options"])
        cells[*setting, row["method"]].append(row)
    print("\n| bits | group | calibrated on | options | method | seeds | scores |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for key, found in sorted(cells.items()):
        names = [
            name
            for name in found[0]["scores"]
            if all(name in row["scores"] for row in found)
        ]
        scores = ", ".join(
            f"{name} {mean(row['scores'][name] for row in found):.3f}" for name in names
        )
        seeds = " ".join(str(row["seed"]) for row in found)
        print(f"| {' | '.join(map(str, key))} | {seeds} | {scores} |")


if __name__ == "__main__":
    main()
