"""Starting `vllm serve` for tests, on loopback."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

VLLM = Path(sys.executable).with_name("vllm")
ENVIRONMENT = {
    **os.environ,
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
# Of tests in several processes each has one core.
if "PYTEST_XDIST_WORKER" in os.environ:
    _WORKER = int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw"))
    _CORES = sorted(os.sched_getaffinity(0))
    ENVIRONMENT["VLLM_CPU_OMP_THREADS_BIND"] = str(_CORES[_WORKER % len(_CORES)])


@contextmanager
def server(
    model: Path | str,
    log: Path,
    *options: str,
    environment: dict[str, str] = ENVIRONMENT,
) -> Iterator[str]:
    """Serve a folder, or a repo of the Hub; gives the base URL of its API."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(VLLM), "serve", str(model), "--enforce-eager"]
    command += ["--host", "127.0.0.1", "--port", str(port), *options]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        _wait(process, f"http://127.0.0.1:{port}/health", log)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        try:
            process.wait(60)
        finally:
            # Workers outlive a server that did not stop by itself.
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def refusal(folder: Path, *options: str) -> tuple[int, list[str]]:
    """Serve something that must be refused: exit code and the `tacq:` log lines."""
    command = [str(VLLM), "serve", str(folder), "--enforce-eager", *options]
    result = subprocess.run(
        command,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )
    lines = [line for line in result.stdout.splitlines() if "] tacq: " in line]
    return result.returncode, lines


def _wait(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended:\n{log.read_text()[-4000:]}")
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise TimeoutError(f"the server did not start:\n{log.read_text()[-4000:]}")
