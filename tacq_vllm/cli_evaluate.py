"""The command that scores a model; `cli` adds it to `tacq`."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tacq_vllm.cli_options import (
    DataRoot,
    Device,
    DeviceOption,
    InputError,
    check_file,
    split_names,
    torch_device,
)
from tacq_vllm.terminal import open_listener

if TYPE_CHECKING:
    from tacq_vllm.scores import Score, Scores


class BackendOption(StrEnum):
    """Values of --backend."""

    hf = "hf"
    vllm = "vllm"


class DtypeOption(StrEnum):
    """Values of --dtype."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


Tasks = Annotated[
    str,
    typer.Option(
        help="Some of wikitext2, c4, mmlu, gsm8k, spider, and of mmlu-loss, "
        "gsm8k-loss, spider-loss, with commas."
    ),
]
Limit = Annotated[
    int | None,
    typer.Option(min=1, help="Windows of a text, items of a question set; else all."),
]
Window = Annotated[int, typer.Option(min=2, help="Tokens of a window of text.")]
MaxLength = Annotated[
    int, typer.Option(min=2, help="Tokens of a prompt and its answer; more is cut.")
]


def evaluate(
    model: Annotated[
        str,
        typer.Argument(
            metavar="DIR_OR_MODEL",
            help="A checkpoint or a 16-bit model: a folder, a Hub id, a .gguf file.",
            show_default=False,
        ),
    ],
    tasks: Tasks,
    backend: Annotated[
        BackendOption, typer.Option(help="Transformers, or vLLM.")
    ] = BackendOption.hf,
    limit: Limit = None,
    data_root: DataRoot = None,
    baseline: Annotated[
        str | None,
        typer.Option(help="The 16-bit model, or the file that --json wrote of it."),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the scores to this file.")
    ] = None,
    samples: Annotated[
        Path | None,
        typer.Option(help="Log of every answer (.jsonl); a later run goes on from it."),
    ] = None,
    window: Window = 1024,
    max_length: MaxLength = 4096,
    dtype: Annotated[
        DtypeOption, typer.Option(help="Of weights and activations.")
    ] = DtypeOption.float32,
    dequantize: Annotated[
        bool,
        typer.Option(
            "--dequantize", help="With hf: unpack a packed model first; more memory."
        ),
    ] = False,
    device: Device = DeviceOption.auto,
) -> None:
    """Score a model, packed or in 16 bits: perplexity, answers, loss on answers."""
    from transformers.utils import logging as transformers_logging

    from tacq_vllm.evaluate.backends import Backend, open_runner
    from tacq_vllm.evaluate.evaluation import (
        check_baseline,
        evaluate_model,
        with_baseline,
    )
    from tacq_vllm.evaluate.samples import SampleLog
    from tacq_vllm.evaluate.tasks import Protocol, figures, load_tasks
    from tacq_vllm.format.staging import staged_file
    from tacq_vllm.quantize.progress import Progress
    from tacq_vllm.scores import read_scores_file

    if backend is BackendOption.vllm and (dequantize or device != DeviceOption.auto):
        raise InputError("--dequantize and --device: each is for --backend hf")
    check_file("--json", json_file)
    check_file("--samples", samples)
    protocol = Protocol(data_root=data_root, limit=limit, window=window)
    engine = Backend(
        engine=backend.value,
        dtype=dtype.value,
        max_length=max_length,
        device=torch_device(device),
        dequantize=dequantize,
    )
    log = SampleLog(samples)
    settings = engine.settings | protocol.settings
    # Of a model in 16 bits it changes nothing: a baseline may differ in it.
    stored = settings | {"dequantize": "yes" if dequantize else "no"}
    measures = load_tasks(split_names(tasks), protocol)
    reference = None
    if baseline is not None and baseline.endswith(".json"):
        reference = read_scores_file(Path(baseline))
        check_baseline(reference, settings, figures(measures), limit)
    transformers_logging.disable_progress_bar()

    with open_listener(leads=True) as listener:

        def measure(name: str) -> "Scores":
            with open_runner(name, engine) as runner:
                return evaluate_model(runner, measures, stored, log, Progress(listener))

        if baseline is not None and reference is None:
            reference = measure(baseline)
        scores = measure(model)
    if reference is not None:
        scores = with_baseline(scores, reference)
    print_scores(scores)
    if json_file is not None:
        # What an earlier run wrote stays until this is whole.
        with staged_file(json_file.resolve()) as staging:
            staging.write_text(scores.model_dump_json(indent=2) + "\n", "utf-8")


def print_scores(scores: "Scores") -> None:
    """A Markdown table."""
    typer.echo("| task | metric | value | ± | 16-bit | recovery | by chance |")
    typer.echo("| --- | --- | --- | --- | --- | --- | --- |")
    for score in scores.scores:
        typer.echo(f"| {' | '.join(_cells(score))} |")


def _cells(score: "Score") -> list[str]:
    task = score.task if score.limit is None else f"{score.task}, limit {score.limit}"
    figures = (score.value, score.stderr, score.baseline)
    return [
        task,
        score.metric.replace("_", " "),
        *("" if figure is None else f"{figure:.4g}" for figure in figures),
        "" if score.recovery is None else f"{score.recovery:.1f} %",
        "" if score.chance is None else f"{score.chance:g}",
    ]
