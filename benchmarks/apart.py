"""Run a benchmark's measurement in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

_MARK = "result: "


def report(result: Any) -> None:
    """Print a result of the script that `run_apart` runs."""
    print(_MARK + json.dumps(result))


def run_apart(script: str, folder: Path, cache_gib: int) -> Any:
    """What a script reports of a model, given `--run`.

    Args:
        script: its file.
        folder: of the model.
        cache_gib: memory for vLLM's cache on a CPU, in GiB.
    """
    variables = {"VLLM_CPU_KVCACHE_SPACE": str(cache_gib), "VLLM_NO_USAGE_STATS": "1"}
    result = subprocess.run(
        [sys.executable, script, "--run", str(folder)],
        env=os.environ | variables,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    # vLLM's processes write to the same stream.
    (line,) = (line for line in result.stdout.splitlines() if line.startswith(_MARK))
    return json.loads(line.removeprefix(_MARK))
