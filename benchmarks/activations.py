"""What 8-bit activations cost: perplexity of one checkpoint, read in three ways.

    python benchmarks/activations.py CHECKPOINT --data-root DIR --output RESULTS.json

WikiText-2 perplexity over the first 24 windows of 1024 tokens of the test text, with
the packed linears in float32, in bfloat16, and in bfloat16 with x rounded to 8 bits.
"""

import argparse
import json
import time
from pathlib import Path
from unittest.mock import patch

import torch
from quality import WINDOW, WINDOWS, score
from transformers import AutoModelForCausalLM, AutoTokenizer

import tacq_vllm.integrations.transformers  # noqa: F401 - registers the format
from tacq_vllm.data.sets import load_named_set
from tacq_vllm.kernels import cpu_linear

READINGS = (("float32", "exact"), ("bfloat16", "exact"), ("bfloat16", "int8"))


def main() -> None:
    """Measure all readings."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--data-root", type=Path, help="named sets; without: the Hub")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(arguments.checkpoint)
    named = load_named_set("wikitext2", "evaluation", arguments.data_root)
    ids = tokenizer("".join(named.documents)).input_ids[: WINDOWS * WINDOW]
    windows = [(window, 1) for window in torch.tensor(ids).view(WINDOWS, WINDOW)]
    rows = []
    for dtype, activations in READINGS:
        model = AutoModelForCausalLM.from_pretrained(
            arguments.checkpoint, dtype=getattr(torch, dtype)
        )
        with patch.object(cpu_linear, "activations", lambda chosen=activations: chosen):
            scores = score(model, {"wikitext2": windows})
        row = {
            "checkpoint": arguments.checkpoint.name,
            "dtype": dtype,
            "activations": activations,
            "date": time.strftime("%Y-%m-%d"),
            **scores,
        }
        rows.append(row)
        print(json.dumps(row), flush=True)
    arguments.output.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
