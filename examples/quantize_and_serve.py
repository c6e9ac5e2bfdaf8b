"""Quantize a model for a task, serve it with vLLM, and ask it one question.

    python examples/quantize_and_serve.py MODEL TASK.jsonl OUTPUT [QUESTION]

MODEL is a Hub id, a folder or a `.gguf` file. TASK.jsonl says what the model is for: a
line has `messages`, or a `prompt` and its `completion` (examples/data/questions.jsonl).
OUTPUT becomes the checkpoint.
"""

import argparse
import subprocess
from pathlib import Path

from openai import OpenAI
from serve_and_ask import ask, find_command, serve


def main() -> None:
    """Quantize, serve, ask, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("task", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("question", nargs="?", default="What is the capital of China?")
    parser.add_argument("--bits", choices=("2", "3", "4"), default="3")
    parser.add_argument("--group-size", default="64", help="must divide the widths")
    arguments = parser.parse_args()

    quantize(
        arguments.model,
        arguments.task,
        arguments.output,
        *("--bits", arguments.bits, "--group-size", arguments.group_size),
    )
    with serve(arguments.output) as base_url:
        client = OpenAI(base_url=base_url, api_key="none")
        answer, _ = ask(client, arguments.question, max_tokens=64)
    print(answer)


def quantize(model: str, task: Path, output: Path, *options: str) -> None:
    """Make a checkpoint, calibrated for a task."""
    command = [find_command("tacq"), "quantize", model, "--output", str(output)]
    subprocess.run([*command, "--calibration", str(task), *options], check=True)


if __name__ == "__main__":
    main()
