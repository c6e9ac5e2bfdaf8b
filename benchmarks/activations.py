"""What 8-bit activations cost: perplexity of one checkpoint, read in several ways.

    python benchmarks/activations.py CHECKPOINT --data-root DIR --output RESULTS.json

WikiText-2 perplexity over the first 24 windows of 1024 tokens of the test text, with
the packed linears in float32, in bfloat16, and in bfloat16 with x rounded to 8 bits; on
a processor with AMX also as it reads more than a few tokens, in bfloat16 throughout.
"""

import argparse
import json
import time
from pathlib import Path
from unittest.mock import patch

import torch

from tacq_vllm.data.sets import load_named_set
from tacq_vllm.evaluate.respondent import Respondent
from tacq_vllm.evaluate.samples import SampleLog
from tacq_vllm.evaluate.text import perplexity
from tacq_vllm.evaluate.transformers_runner import open_transformers
from tacq_vllm.kernels import cpu_linear
from tacq_vllm.kernels.cpu_amx import has_amx
from tacq_vllm.quantize.progress import Progress

READINGS = [
    ("float32", "exact", False),
    ("bfloat16", "exact", False),
    ("bfloat16", "int8", False),
    *[("bfloat16", "int8", True)] * has_amx(),
]
"""The type of x, what is made of it, and whether AMX multiplies."""
CPU = torch.device("cpu")
WINDOW = 1024


def main() -> None:
    """Measure all readings."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--data-root", type=Path, help="named sets; without: the Hub")
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()

    documents = load_named_set("wikitext2", "evaluation", arguments.data_root).documents
    rows = []
    for dtype, activations, by_amx in READINGS:
        with (
            patch.object(cpu_linear, "activations", lambda chosen=activations: chosen),
            patch.object(cpu_linear, "has_amx", lambda chosen=by_amx: chosen),
        ):
            runner = open_transformers(
                str(arguments.checkpoint),
                getattr(torch, dtype),
                CPU,
                WINDOW,
                dequantize=False,
            )
            respondent = Respondent(runner, SampleLog(None), Progress())
            (score,) = perplexity(
                "wikitext2", documents, WINDOW, arguments.windows, respondent
            )
        row = {
            "checkpoint": arguments.checkpoint.name,
            "dtype": dtype,
            "activations": activations,
            "amx": by_amx,
            "date": time.strftime("%Y-%m-%d"),
            "wikitext2 ppl": score.value,
        }
        rows.append(row)
        print(json.dumps(row), flush=True)
    arguments.output.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
