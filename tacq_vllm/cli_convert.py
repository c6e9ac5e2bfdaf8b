"""The commands between TaCQ and other formats; `cli` adds them to `tacq`."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from tacq_vllm.cli_options import Output
from tacq_vllm.terminal import open_listener


class TargetOption(StrEnum):
    """Values of --to."""

    dequantized = "dequantized"


def export_checkpoint(
    checkpoint: Annotated[
        Path,
        typer.Argument(metavar="DIR", help="A checkpoint folder.", show_default=False),
    ],
    to: Annotated[TargetOption, typer.Option(help="An ordinary 16-bit checkpoint.")],
    output: Output,
) -> None:
    """Write a checkpoint for tools that do not know TaCQ."""
    from tacq_vllm.convert.dequantized import export_dequantized
    from tacq_vllm.quantize.progress import Progress

    with open_listener(leads=True) as listener:
        export_dequantized(checkpoint, output, Progress(listener))
    typer.echo(f"{output}: {to.value}")


def import_checkpoint(
    checkpoint: Annotated[
        str,
        typer.Argument(
            metavar="CHECKPOINT",
            help="GPTQ, or compressed-tensors pack-quantized: a folder or a Hub id.",
            show_default=False,
        ),
    ],
    output: Output,
    base: Annotated[
        str | None,
        typer.Option(
            help="The 16-bit model, some of whose weights are to be kept: a folder or "
            "a Hub id."
        ),
    ] = None,
    outlier_ratio: Annotated[
        float | None, typer.Option(help="Share of weights kept in 16 bits.")
    ] = None,
) -> None:
    """Make a TaCQ checkpoint with the weights of a quantized one."""
    from tacq_vllm.convert import importing
    from tacq_vllm.quantize.progress import Progress

    with open_listener(leads=True) as listener:
        importing.import_checkpoint(
            checkpoint, output, Progress(listener), base, outlier_ratio
        )
    typer.echo(f"{output}: imported")
