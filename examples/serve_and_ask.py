"""Serve a TaCQ checkpoint with vLLM and ask it one question.

    python examples/serve_and_ask.py CHECKPOINT [QUESTION]

Starts `vllm serve CHECKPOINT --quantization tacq`, asks with the official `openai`
client, stops the server, and prints one JSON line: the answer, tokens per second, and
what the checkpoint costs.
"""

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from openai import OpenAI

from tacq_vllm.format.checkpoint import read_schema
from tacq_vllm.format.inspection import inspect_checkpoint

START_SECONDS = 600


def main() -> None:
    """Serve, ask, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("question", nargs="?", default="What is the capital of China?")
    arguments = parser.parse_args()

    with serve(arguments.checkpoint) as base_url:
        client = OpenAI(base_url=base_url, api_key="none")
        ask(client, "Hello!", max_tokens=4)  # warm-up
        answer, tokens_per_second = ask(client, arguments.question, max_tokens=32)

    figures = inspect_checkpoint(arguments.checkpoint)
    result = {
        "model": arguments.checkpoint.name,
        "recipe": read_schema(arguments.checkpoint).recipe,
        "question": arguments.question,
        "answer": answer,
        "tokens_per_second": round(tokens_per_second, 2),
        "effective_bits": round(figures.effective_bits, 4),
        "checkpoint_bytes": figures.checkpoint_bytes,
        "paper_bits": round(figures.paper_bits, 4),
    }
    print(json.dumps(result))


@contextmanager
def serve(checkpoint: Path, *options: str) -> Iterator[str]:
    """Run a server on a free port; gives its base URL once it answers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        find_command("vllm"),
        *("serve", str(checkpoint), "--quantization", "tacq"),
        *("--host", "127.0.0.1", "--port", str(port), "--max-model-len", "2048"),
        *options,
    ]
    environment = dict(os.environ)
    if not torch.cuda.is_available():
        command.append("--enforce-eager")
        environment.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    server = subprocess.Popen(
        command, env=environment, stdout=sys.stderr, stderr=sys.stderr
    )
    try:
        wait_until_ready(server, f"http://127.0.0.1:{port}/health")
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait(timeout=60)


def find_command(name: str) -> str:
    """A command that was installed beside this Python, or else on the path."""
    return shutil.which(name, path=Path(sys.executable).parent) or name


def wait_until_ready(server: subprocess.Popen[bytes], health_url: str) -> None:
    """Poll until the server answers, and stop if it died or takes too long."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if server.poll() is not None:
            sys.exit(f"the server ended with exit code {server.returncode}")
        try:
            with urllib.request.urlopen(health_url, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(1)
    sys.exit(f"the server was not ready after {START_SECONDS} s")


def ask(client: OpenAI, question: str, max_tokens: int) -> tuple[str, float]:
    """One greedy chat answer, and its tokens per second, the prompt included."""
    model = client.models.list().data[0].id
    start = time.perf_counter()
    response = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": question}],
        temperature=0,
        max_tokens=max_tokens,
    )
    seconds = time.perf_counter() - start
    assert response.usage is not None
    answer = response.choices[0].message.content or ""
    return answer, response.usage.completion_tokens / seconds


if __name__ == "__main__":
    main()
