"""Running vLLM; a program, which the tests of models and features start.

vLLM takes long to import, and its CPU backend does not start anew in a process that
numba's compiler has been loaded into: this imports it once, and each process of
`tests.forking` runs it. A request names a function here.
"""

import json
import os
from pathlib import Path
from typing import Any

from tests.forking import answer_requests

NEW_TOKENS = 12


def generate(
    folder: str,
    options: dict[str, Any],
    prompts: list[list[int]],
    answers: str,
    adapter: str | None = None,
    reloads: bool = False,
    sleeps: bool = False,
) -> None:
    """Write the new tokens of each prompt to a file, and log vLLM's counters."""
    if options.get("tensor_parallel_size") == 2:
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "0|1"
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest
    from vllm.v1.metrics.reader import Counter

    model = open_model(folder, options | {"disable_log_stats": False})
    if reloads:
        model.collective_rpc("reload_weights")
    if sleeps:
        model.sleep()
        model.wake_up()
    outputs = model.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts],
        SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True),
        use_tqdm=False,
        lora_request=LoRARequest("adapter", 1, adapter) if adapter else None,
    )
    tokens = [list(output.outputs[0].token_ids) for output in outputs]
    Path(answers).write_text(json.dumps(tokens))
    for metric in model.get_metrics():
        if isinstance(metric, Counter):
            print(metric.name, metric.value)


def embed(
    folder: str, options: dict[str, Any], prompts: list[list[int]], answers: str
) -> None:
    """Write the embedding of each prompt to a file."""
    model = open_model(folder, options | {"runner": "pooling", "convert": "embed"})
    outputs = model.embed(
        [{"prompt_token_ids": prompt} for prompt in prompts], use_tqdm=False
    )
    vectors = [output.outputs.embedding for output in outputs]
    Path(answers).write_text(json.dumps(vectors))


def evaluate(
    folder: str, options: dict[str, Any], prompts: list[list[int]], answers: str
) -> None:
    """Write the scores to a file; options are those of `tacq evaluate`."""
    from tacq_vllm.cli import app

    given = [f"--{name}={value}" for name, value in options.items()]
    arguments = [folder, "--backend=vllm", f"--json={answers}", *given]
    app(["evaluate", *arguments], standalone_mode=False)


def open_model(folder: str, options: dict[str, Any]) -> Any:
    """The model, in float32 and not compiled, unless the options say otherwise."""
    from vllm import LLM

    usual = {"dtype": "float32", "enforce_eager": True, "max_model_len": 64}
    return LLM(folder, **usual | options)


def main() -> None:
    """Answer each request with the exit code of its process."""
    replies = os.fdopen(os.dup(1), "w")
    # What vLLM prints goes where its log does.
    os.dup2(2, 1)
    import vllm.v1.engine.llm_engine  # noqa: F401

    functions = {f.__name__: f for f in (generate, embed, evaluate)}
    answer_requests(lambda function, **request: functions[function](**request), replies)


if __name__ == "__main__":
    main()
