"""The command that compares methods on one model; `cli` adds it to `tacq`."""

from pathlib import Path
from typing import Annotated

import typer

from tacq_vllm.cli_evaluate import Limit, MaxLength, Tasks, Window
from tacq_vllm.cli_options import (
    DataRoot,
    Device,
    DeviceOption,
    InputError,
    ModelName,
    apply_options,
    split_names,
    torch_device,
)
from tacq_vllm.terminal import open_listener


def compare(
    model: ModelName,
    tasks: Tasks,
    output: Annotated[
        Path,
        typer.Option(help="Folder of the results; a later run adds to what is there."),
    ],
    methods: Annotated[
        str,
        typer.Option(help="Methods of `quantize`, and saliencies, with commas."),
    ] = "gptq,tacq",
    bits: Annotated[str, typer.Option(help="Some of 2, 3, 4, with commas.")] = "3",
    group_size: Annotated[
        str, typer.Option(help="Columns that share a scale, with commas; -1: the row.")
    ] = "64",
    calibration: Annotated[
        str,
        typer.Option(help="Sources as of `quantize`, with commas: a model for each."),
    ] = "wikitext2",
    seeds: Annotated[str, typer.Option(help="Of sampling, with commas.")] = "0",
    recipe: Annotated[
        str | None, typer.Option(help="A recipe of which each model changes fields.")
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FIELD=VALUE",
            help="Another field of the recipe, for all models; may be repeated.",
        ),
    ] = None,
    num_samples: Annotated[int, typer.Option(help="Calibration windows.")] = 64,
    seq_len: Annotated[int, typer.Option(help="Tokens of a calibration window.")] = 512,
    work_dir: Annotated[
        Path | None,
        typer.Option(
            help="Where gradients and passes are kept, for all models; else in the "
            "output folder."
        ),
    ] = None,
    data_root: DataRoot = None,
    limit: Limit = None,
    window: Window = 1024,
    max_length: MaxLength = 4096,
    device: Device = DeviceOption.auto,
) -> None:
    """Quantize one model in many ways, and score each on the same data."""
    from tacq_vllm.compare.matrix import Matrix
    from tacq_vllm.config import Recipe, load_recipe

    base_recipe = apply_options(
        load_recipe(recipe) if recipe else Recipe(),
        {
            "calibration.num_samples": ("--num-samples", num_samples),
            "calibration.seq_len": ("--seq-len", seq_len),
        },
    )
    matrix = Matrix(
        methods=split_names(methods),
        bits=_numbers("--bits", bits),
        group_sizes=_numbers("--group-size", group_size),
        calibrations=split_names(calibration),
        seeds=_numbers("--seeds", seeds),
        options=" ".join(option or ()),
    )
    cells = matrix.cells(base_recipe)

    from transformers.utils import logging as transformers_logging

    from tacq_vllm.compare.report import write_report
    from tacq_vllm.compare.run import WORK_FOLDER, Comparison, check_folder
    from tacq_vllm.evaluate.backends import Backend
    from tacq_vllm.evaluate.tasks import Protocol, load_tasks
    from tacq_vllm.quantize.model import open_base_model
    from tacq_vllm.quantize.progress import Progress
    from tacq_vllm.quantize.workdir import open_workdir
    from tacq_vllm.quantize.world import World

    check_folder(output)
    protocol = Protocol(data_root=data_root, limit=limit, window=window)
    loaded = load_tasks(split_names(tasks), protocol)
    transformers_logging.disable_progress_bar()
    own_device = torch_device(device)
    with (
        open_workdir(work_dir or output / WORK_FOLDER, output, World()) as workdir,
        open_listener(leads=True) as listener,
    ):
        comparison = Comparison(
            model=model,
            base=open_base_model(model, own_device, workdir),
            recipe=base_recipe,
            tasks=loaded,
            protocol=protocol,
            backend=Backend(
                engine="hf",
                dtype="float32",
                max_length=max_length,
                device=own_device,
                dequantize=True,
            ),
            folder=output,
            workdir=workdir,
        )
        rows = comparison.run(cells, Progress(listener))
    typer.echo(write_report(rows, output), nl=False)


def _numbers(name: str, option: str) -> list[int]:
    try:
        return [int(part) for part in split_names(option)]
    except ValueError as error:
        raise InputError(f"{name} {option}: not whole numbers with commas") from error
