"""A server under load for a while: what it answers, how long it takes, what it keeps.

    python -m benchmarks.soak CHECKPOINT [--requests 2000] [--at-once 16]

Serves the checkpoint in float32, whose product is exact, and sends requests of mixed
lengths: most are read to the end, some clients vanish in the middle of a stream, some
requests are bad. Memory is that of all processes of the server together. Writes JSON
and prints it; exit code 1 if a request failed that should not, an answer changed, or
memory grew by more than 3 % after the warm-up.
"""

import argparse
import asyncio
import json
import os
import platform
import random
import statistics
import sys
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks.machine import device_name
from examples.serve_and_ask import serve

RESULTS = Path(__file__).parent / "results" / "soak.json"
MAX_MODEL_LEN = 512
PROMPT_WORDS = (1, 5, 10, 20, 40, 80)
OUTPUT_TOKENS = (1, 2, 4, 8, 16)
VANISHING, BAD = 0.1, 0.05
"""Shares of the clients that go away, and of the requests that are bad."""
WARM_UP = 0.2
"""Share of the requests after which the server has touched its whole cache."""
GROWTH = 0.03
PROBES = (
    "The capital of France is",
    "def fibonacci(n):",
    "Water boils at a temperature of",
    "Once upon a time there was",
)
BAD_REQUESTS: tuple[dict[str, Any], ...] = (
    {"prompt": "x", "max_tokens": -1},
    {"prompt": "x", "temperature": "hot"},
    {"prompt": "x", "model": "nobody/nothing"},
    {"prompt": "word " * (4 * MAX_MODEL_LEN), "max_tokens": 1},
    {"prompt": {"not": "a prompt"}},
)


@dataclass
class Tally:
    """What has happened so far."""

    seconds: list[float] = field(default_factory=list)
    """Of each request that was read to the end."""
    tokens: int = 0
    vanished: int = 0
    refused: int = 0
    errors: list[str] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)
    """Bytes, after every `WARM_UP` of the requests."""


def main() -> None:
    """Serve, load, judge."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--at-once", type=int, default=16)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    options = ("--dtype", "float32", "--max-model-len", str(MAX_MODEL_LEN))
    with serve(arguments.checkpoint, *options) as base_url:
        result = asyncio.run(soak(base_url, arguments.requests, arguments.at_once))
    result = {"model": arguments.checkpoint.name, **result, **environment()}
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
    sys.exit(0 if result["passed"] else 1)


async def soak(base_url: str, requests: int, at_once: int) -> dict[str, Any]:
    """Send requests to a server that this process has started, and count.

    Args:
        base_url: of its API, `.../v1`.
        requests: how many, the bad ones and the vanishing clients included.
        at_once: how many at a time.

    Returns:
        Figures: seconds, bytes, and whether all was well.
    """
    tally = Tally()
    async with httpx.AsyncClient(
        base_url=base_url,
        timeout=600,
        limits=httpx.Limits(max_connections=at_once),
    ) as client:
        model = (await client.get("/models")).json()["data"][0]["id"]
        before = [await probe(client, model, prompt) for prompt in PROBES]
        start = time.perf_counter()
        await send_all(client, model, requests, at_once, tally)
        wall = time.perf_counter() - start
        after = [await probe(client, model, prompt) for prompt in PROBES]
    warm, *later = tally.memory
    growth = later[-1] / warm - 1
    return {
        "requests": requests,
        "at_once": at_once,
        "answered": len(tally.seconds),
        "output_tokens": tally.tokens,
        "vanished": tally.vanished,
        "refused": tally.refused,
        "errors": tally.errors,
        "p50_seconds": round(statistics.median(tally.seconds), 3),
        "p99_seconds": round(percentile(tally.seconds, 99), 3),
        "wall_seconds": round(wall, 1),
        "warm_up_requests": int(WARM_UP * requests),
        "rss_mb": [round(nbytes / 1e6, 1) for nbytes in tally.memory],
        "rss_growth": round(growth, 4),
        "same_answers": before == after,
        "passed": not tally.errors and before == after and abs(growth) <= GROWTH,
    }


async def send_all(
    client: httpx.AsyncClient, model: str, requests: int, at_once: int, tally: Tally
) -> None:
    """Send the requests, so many at once; between fifths of them look at memory."""
    parts = round(1 / WARM_UP)
    for part in range(parts):
        queue = iter(range(part * requests // parts, (part + 1) * requests // parts))

        async def work(numbers: Any = queue) -> None:
            for number in numbers:
                await send(client, model, number, tally)

        await asyncio.gather(*(work() for _ in range(at_once)))
        tally.memory.append(server_memory(client.base_url.port))


async def send(
    client: httpx.AsyncClient, model: str, number: int, tally: Tally
) -> None:
    """Send one request, which depends on its number alone."""
    choose = random.Random(number)
    share = choose.random()
    if share < BAD:
        await send_bad(client, model, BAD_REQUESTS[number % len(BAD_REQUESTS)], tally)
        return
    length = choose.choice(PROMPT_WORDS)
    words = choose.choices(("river", "city", "the", "of", "12", "blue"), k=length)
    body = {
        "model": model,
        "prompt": " ".join(words),
        "temperature": 0,
        "ignore_eos": True,
        "max_tokens": choose.choice(OUTPUT_TOKENS),
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    vanishes = share < BAD + VANISHING
    if vanishes:
        body["max_tokens"] = max(OUTPUT_TOKENS)
    start = time.perf_counter()
    try:
        async with client.stream("POST", "/completions", json=body) as response:
            response.raise_for_status()
            lines = response.aiter_lines()
            if vanishes:
                await anext(lines)
                tally.vanished += 1
                return
            usage = [json.loads(x[6:])["usage"] async for x in lines if "usage" in x]
    except (httpx.HTTPError, ValueError, KeyError) as error:
        tally.errors.append(f"request {number}: {type(error).__name__}: {error}")
        return
    tally.seconds.append(time.perf_counter() - start)
    tokens = usage[-1]["completion_tokens"]
    tally.tokens += tokens
    if tokens != body["max_tokens"]:
        tally.errors.append(f"request {number}: {tokens} of {body['max_tokens']}")


async def send_bad(
    client: httpx.AsyncClient, model: str, bad: dict[str, Any], tally: Tally
) -> None:
    """Send what must be refused."""
    response = await client.post("/completions", json={"model": model, **bad})
    if 400 <= response.status_code < 500:
        tally.refused += 1
    else:
        tally.errors.append(f"{list(bad)}: answered with {response.status_code}")


async def probe(client: httpx.AsyncClient, model: str, prompt: str) -> str:
    """A greedy answer."""
    body = {"model": model, "prompt": prompt, "temperature": 0, "max_tokens": 16}
    response = await client.post("/completions", json=body)
    response.raise_for_status()
    return str(response.json()["choices"][0]["text"])


def server_memory(port: int | None) -> int:
    """Resident bytes of the server on a port, which this process has started."""
    total = 0
    for child in psutil.Process().children():
        if str(port) in child.cmdline():
            tree = (child, *child.children(recursive=True))
            total += sum(process.memory_info().rss for process in tree)
    assert total, f"no child of this process serves on port {port}"
    return total


def percentile(values: list[float], percent: int) -> float:
    """The value below which so many percent are."""
    return sorted(values)[min(len(values) - 1, len(values) * percent // 100)]


def environment() -> dict[str, Any]:
    """What the figures hold for."""
    return {
        "device": device_name("cpu", os.cpu_count() or 1),
        "python": platform.python_version(),
        "torch": version("torch"),
        "vllm": version("vllm"),
        "tacq_vllm": version("tacq-vllm"),
        "date": time.strftime("%Y-%m-%d"),
    }


if __name__ == "__main__":
    main()
