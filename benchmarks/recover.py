"""What `tacq recover` wins back: magnitudes, A and B, or both, and how fast.

    python benchmarks/recover.py MODEL CHECKPOINT [CHECKPOINT ...] --data-root DIR \
        --runs magnitude:15,lora:15,both:15,both:60 --work-dir WORK --output RESULTS

Each checkpoint folder is trained from the 16-bit MODEL, once for every WHAT:MINUTES, on
WikiText-2 or on a task (`--calibration`). Measured are, in float32, mean losses on
held-out text: the first 24 windows of 1024 tokens of WikiText-2's test split, or the
answers of a task's evaluation items. The share of the gap is that of the loss between
checkpoint and 16-bit model. Rows that the results file holds already are not run again;
at the end all are printed as a table.
"""

import argparse
import json
import platform
import resource
import tempfile
import time
from itertools import product
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

import tacq_vllm.integrations.transformers  # noqa: F401 - registers the format
from tacq_vllm.config import CalibrationConfig, override_recipe
from tacq_vllm.data.sets import load_named_set
from tacq_vllm.evaluate.questions import Questions
from tacq_vllm.format.inspection import inspect_checkpoint
from tacq_vllm.quantize.model import BaseModel, open_base_model
from tacq_vllm.quantize.progress import Progress
from tacq_vllm.quantize.workdir import WorkDir
from tacq_vllm.recover.config import RecoverConfig
from tacq_vllm.recover.pipeline import recover_checkpoint
from tacq_vllm.terminal import open_listener

CPU = torch.device("cpu")
WINDOWS, WINDOW = 24, 1024

Texts = dict[str, list[tuple[Tensor, int]]]
"""By task: tokens, and the first that counts."""


def main() -> None:
    """Train and measure whatever is missing."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a Hub id, a folder or a .gguf file")
    parser.add_argument("checkpoints", type=Path, nargs="+", metavar="CHECKPOINT")
    parser.add_argument("--data-root", type=Path, help="named sets; without: the Hub")
    parser.add_argument("--runs", default="magnitude:15,lora:15,both:15,both:60")
    parser.add_argument("--calibration", default="wikitext2")
    parser.add_argument("--num-samples", type=int, default=256)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--options", nargs="*", default=[], metavar="FIELD=VALUE")
    parser.add_argument("--tasks", default="wikitext2")
    parser.add_argument("--items", type=int, default=40, help="of each task")
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()

    base = open_base_model(arguments.model, CPU, WorkDir(arguments.work_dir))
    texts = {
        task: held_out_texts(base, task, arguments.data_root, arguments.items)
        for task in arguments.tasks.split(",")
    }
    results = Results(arguments.output, base.name)
    if not results.find(checkpoint="16-bit"):
        with base.resident() as model:
            losses = mean_losses(model, texts)
        results.add(checkpoint="16-bit", run="", losses=losses)
    for checkpoint in arguments.checkpoints:
        start = {"checkpoint": checkpoint.name, "run": "start"}
        if not results.find(**start):
            results.add(**start, **measure(checkpoint, texts))
    options = " ".join(arguments.options)
    for run, checkpoint in product(arguments.runs.split(","), arguments.checkpoints):
        what = {"checkpoint": checkpoint.name, "run": run, "options": options}
        what["calibration"] = arguments.calibration
        if not results.find(**what):
            results.add(**what, **train(checkpoint, run, texts, arguments))
    print_table(results.rows)


def train(
    checkpoint: Path, run: str, texts: Texts, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Train a checkpoint as WHAT:MINUTES says, and measure it."""
    trained, _, minutes = run.partition(":")
    fields = {"train": trained, "budget": float(minutes), "budget_unit": "minutes"}
    for option in arguments.options:
        name, _, value = option.partition("=")
        fields[name] = yaml.safe_load(value)
    calibration = CalibrationConfig(
        sources=(arguments.calibration,),
        num_samples=arguments.num_samples,
        seq_len=arguments.seq_len,
    )
    config = RecoverConfig(gradient_checkpointing=False, calibration=calibration)
    with (
        tempfile.TemporaryDirectory() as folder,
        open_listener(leads=True) as listener,
    ):
        output = Path(folder) / "recovered"
        recover_checkpoint(
            checkpoint,
            arguments.model,
            override_recipe(config, fields),
            output,
            CPU,
            WorkDir(arguments.work_dir),
            Progress(listener),
            lambda staged, schema: None,
            arguments.data_root,
        )
        *_, last = map(json.loads, (output / "loss.jsonl").open())
        figures = {name: last[name] for name in ("step", "tokens", "seconds")}
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return figures | {"peak_bytes": peak} | measure(output, texts)


def measure(checkpoint: Path, texts: Texts) -> dict[str, Any]:
    """Bits and losses of a checkpoint."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    return {
        "effective_bits": inspect_checkpoint(checkpoint).effective_bits,
        "losses": mean_losses(model.dequantize(), texts),
    }


class Results:
    """The rows of a results file, and the machine that new ones come from."""

    def __init__(self, path: Path, model: str) -> None:
        self._path = path
        self.rows = json.loads(path.read_text()) if path.is_file() else []
        self._machine = {
            "model": model,
            "cpu_threads": torch.get_num_threads(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "date": time.strftime("%Y-%m-%d"),
        }

    def find(self, **fields: object) -> bool:
        """Whether there is a row with these fields."""
        return any(row.items() >= fields.items() for row in self.rows)

    def add(self, **fields: object) -> None:
        """Store a row and print it."""
        self.rows.append(self._machine | fields)
        self._path.write_text(json.dumps(self.rows, indent=1) + "\n")
        print(json.dumps(self.rows[-1]), flush=True)


def held_out_texts(
    base: BaseModel, task: str, data_root: Path | None, items: int
) -> list[tuple[Tensor, int]]:
    """Samples of a task's evaluation split."""
    named = load_named_set(task, "evaluation", data_root)
    if named.documents:
        ids = base.tokenizer("".join(named.documents)).input_ids
        windows = torch.tensor(ids[: WINDOWS * WINDOW]).view(WINDOWS, WINDOW)
        return [(window, 1) for window in windows]
    samples = []
    for item in Questions.spread(task, named.items, items).items:
        prompt = base.tokenizer(item.prompt).input_ids
        whole = base.tokenizer(item.prompt + item.completion).input_ids
        samples.append((torch.tensor(whole), len(prompt)))
    return samples


@torch.no_grad()
def mean_losses(model: Any, texts: Texts) -> dict[str, float]:
    """The mean over a task's samples of their mean losses."""
    means = {}
    for task, samples in texts.items():
        losses = [
            float(cross_entropy(model(t[None]).logits[0, start - 1 : -1], t[start:]))
            for t, start in samples
        ]
        means[task] = sum(losses) / len(losses)
    return means


def print_table(rows: list[dict[str, Any]]) -> None:
    """Print every run, with the share of the gap that it has closed."""
    (full,) = (row for row in rows if row["checkpoint"] == "16-bit")
    starts = {row["checkpoint"]: row for row in rows if row["run"] == "start"}
    print("\n| checkpoint | bits | trained: minutes | on | steps | loss | gap closed |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for row in sorted(rows, key=lambda row: (row["checkpoint"], row["run"])):
        start = starts.get(row["checkpoint"])
        for task, loss in row["losses"].items():
            closed = ""
            if start is not None and row is not start and task in start["losses"]:
                gap = start["losses"][task] - full["losses"][task]
                closed = f"{(start['losses'][task] - loss) / gap:.1%}"
            cells = [
                row["checkpoint"],
                f"{row.get('effective_bits', 16):.3f}",
                row["run"],
                row.get("calibration", ""),
                str(row.get("step", "")),
                f"{task} {loss:.4f}",
                closed,
            ]
            print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
