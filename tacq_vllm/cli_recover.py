"""The command that trains a checkpoint; `cli` adds it to `tacq`."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from tacq_vllm.cli_options import (
    Calibration,
    DataRoot,
    Device,
    DeviceOption,
    InputError,
    NumSamples,
    Output,
    SeqLen,
    WorkDirectory,
    apply_options,
    torch_device,
)
from tacq_vllm.cli_show import print_summary
from tacq_vllm.terminal import open_listener


class TrainOption(StrEnum):
    """Values of --train."""

    magnitude = "magnitude"
    lora = "lora"
    both = "both"


class PrecisionOption(StrEnum):
    """Values of --precision."""

    auto = "auto"
    bf16 = "bf16"
    fp32 = "fp32"


def recover_checkpoint(
    checkpoint: Annotated[
        Path,
        typer.Argument(metavar="DIR", help="A checkpoint folder.", show_default=False),
    ],
    output: Output,
    base: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="The 16-bit model that was quantized: a Hub id, a folder, or a .gguf "
            "file. Without it nothing is distilled.",
        ),
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(
            help="A .yaml file of training choices; other options override it. Without "
            "it: both, 1 epoch, steps of 1024 tokens, 0.5 distilled, calibration as of "
            "`quantize`."
        ),
    ] = None,
    work_dir: WorkDirectory = None,
    train: Annotated[
        TrainOption | None, typer.Option(help="Group magnitudes, A and B, or both.")
    ] = None,
    train_outliers: Annotated[
        bool | None, typer.Option(help="Train the weights kept in 16 bits, too.")
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Of A and B.")] = None,
    steps: Annotated[int | None, typer.Option(help="Train so many steps.")] = None,
    epochs: Annotated[
        float | None, typer.Option(help="See the text so many times.")
    ] = None,
    minutes: Annotated[float | None, typer.Option(help="Train so long.")] = None,
    batch_tokens: Annotated[int | None, typer.Option(help="Tokens of a step.")] = None,
    distill: Annotated[
        float | None,
        typer.Option(help="Share of the loss that the 16-bit model sets, 0 to 1."),
    ] = None,
    calibration: Calibration = None,
    data_root: DataRoot = None,
    num_samples: NumSamples = None,
    seq_len: SeqLen = None,
    seed: Annotated[int | None, typer.Option(help="Of sampling and training.")] = None,
    precision: Annotated[
        PrecisionOption | None, typer.Option(help="Of products.")
    ] = None,
    gradient_checkpointing: Annotated[
        bool | None, typer.Option(help="Less memory for more time.")
    ] = None,
    device: Device = DeviceOption.auto,
) -> None:
    """Train a checkpoint, at equal bits, to win back what few bits lost (DL-QAT)."""
    from tacq_vllm.recover.config import RecoverConfig, load_recover_config

    budgets = {"steps": steps, "epochs": epochs, "minutes": minutes}
    given = {unit: budget for unit, budget in budgets.items() if budget is not None}
    if len(given) > 1:
        raise InputError(f"{' and '.join(f'--{unit}' for unit in given)}: give one")
    unit, budget = next(iter(given.items()), (None, None))
    if budget is not None and budget <= 0:
        raise InputError(f"--{unit} {budget}: give more than 0")
    if distill and base is None:
        raise InputError(
            f"--distill {distill}: needs --base, the 16-bit model that is to set it"
        )
    config = apply_options(
        load_recover_config(recipe) if recipe else RecoverConfig(),
        {
            "train": ("--train", train),
            "train_outliers": ("--train-outliers", train_outliers),
            "rank": ("--rank", rank),
            "budget": (f"--{unit}", budget),
            "budget_unit": (f"--{unit}", unit),
            "batch_tokens": ("--batch-tokens", batch_tokens),
            "distill": ("--distill", distill),
            "precision": ("--precision", precision),
            "gradient_checkpointing": (
                "--gradient-checkpointing",
                gradient_checkpointing,
            ),
            "seed": ("--seed", seed),
            "calibration.sources": ("--calibration", calibration),
            "calibration.num_samples": ("--num-samples", num_samples),
            "calibration.seq_len": ("--seq-len", seq_len),
            "calibration.seed": ("--seed", seed),
        },
    )

    from transformers.utils import logging as transformers_logging

    from tacq_vllm.hub import rewrite_model_card
    from tacq_vllm.quantize.progress import Progress
    from tacq_vllm.quantize.workdir import check_output, open_workdir
    from tacq_vllm.quantize.world import open_world
    from tacq_vllm.recover import pipeline

    check_output(output, work_dir)
    transformers_logging.disable_progress_bar()
    with open_world(torch_device(device)) as (world, own_device):
        with (
            open_workdir(work_dir, output, world) as folder,
            open_listener(world.leads) as listener,
        ):
            pipeline.recover_checkpoint(
                checkpoint,
                base,
                config,
                output,
                own_device,
                folder,
                Progress(listener),
                lambda staged, schema: rewrite_model_card(staged, schema, checkpoint),
                data_root,
                world,
            )
        if world.leads:
            print_summary(output)
