"""What the commands print about checkpoints and uploads."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.table import Table
from rich.text import Text

from tacq_vllm.terminal import out

if TYPE_CHECKING:
    from tacq_vllm.format.inspection import Inspection
    from tacq_vllm.hub.push import Push


def print_push(plan: "Push") -> None:
    """Files, sizes and card of an upload."""
    for name, nbytes in plan.sizes.items():
        typer.echo(f"{nbytes:>15,}  {name}")
    for name in plan.deleted:
        typer.echo(f"{'deleted':>15}  {name}")
    where = "a new private repo" if plan.private else "a new repo"
    if not plan.makes_repo:
        where = "a new branch" if plan.makes_branch else "the repo"
    typer.echo(
        f"{sum(plan.sizes.values()):>15,}  bytes for {plan.repo_id}, branch "
        f"{plan.branch}, {where}; its card:\n\n{plan.card}"
    )


def print_summary(folder: Path) -> None:
    """One line about a new checkpoint."""
    from tacq_vllm.format.inspection import inspect_checkpoint

    figures = inspect_checkpoint(folder)
    remark = f"simulated {figures.simulated}, weights in 16 bits"
    if figures.paper_bits is not None:
        remark = f"{figures.paper_bits:.3f} by the paper's formula"
    typer.echo(
        f"{folder}: {figures.effective_bits:.3f} effective bits ({remark}), "
        f"{figures.outliers:,} weights kept, {figures.checkpoint_bytes / 1e6:.1f} MB"
    )


def inspection_json(figures: "Inspection") -> dict[str, object]:
    """What `tacq inspect --json` prints."""
    return {
        "simulated": figures.simulated,
        "layout": figures.layout,
        "bits": figures.bits,
        "code_bits": figures.code_bits,
        "group_size": figures.group_size,
        "dtype": figures.dtype,
        "effective_bits": figures.effective_bits,
        "paper_bits": figures.paper_bits,
        "weights": figures.weights,
        "outliers": figures.outliers,
        "linear_bytes": figures.linear_bytes,
        "checkpoint_bytes": figures.checkpoint_bytes,
        "tensor_parallel_sizes": figures.tensor_parallel_sizes,
        "linears": [
            {**asdict(linear), "effective_bits": linear.effective_bits}
            for linear in figures.linears
        ],
    }


def print_inspection(figures: "Inspection") -> None:
    """A table of the linears, then bits and bytes."""
    from tacq_vllm.format.schema import printable

    table = Table("linear", "shape", "outliers", "share %", "bytes", "bits")
    for linear in figures.linears:
        table.add_row(
            Text(printable(linear.name)),
            f"{linear.out_features}x{linear.in_features}",
            f"{linear.outliers}",
            f"{100 * linear.outliers / linear.weights:.3f}",
            f"{linear.nbytes}",
            f"{linear.effective_bits:.3f}",
        )
    out.print(table)
    group = "row" if figures.group_size == -1 else f"{figures.group_size} columns"
    per = "a table" if figures.simulated == "squeezellm" else "a scale"
    typer.echo(
        f"{figures.code_bits:.3g} bits, {per} per {group}, {figures.dtype}; "
        f"{figures.outliers:,} of {figures.weights:,} weights kept in 16 bits"
    )
    if figures.paper_bits is None:
        typer.echo(
            f"simulated: the weights that {figures.simulated} gives, in 16 bits; "
            "nothing is packed\n"
            f"effective bits {figures.effective_bits:.4f}, if all its parts were packed"
            f"\nquantized linears {figures.linear_bytes:,} bytes, if packed; "
            f"weight files {figures.checkpoint_bytes:,} bytes"
        )
        return
    typer.echo(
        f"effective bits {figures.effective_bits:.4f} "
        f"(codes, scales, zero-points, kept weights, indices); "
        f"paper's formula {figures.paper_bits:.4f}\n"
        f"quantized linears {figures.linear_bytes:,} bytes; "
        f"weight files {figures.checkpoint_bytes:,} bytes\n"
        f"tensor-parallel sizes: {_sizes_text(figures.tensor_parallel_sizes)}"
    )


def _sizes_text(sizes: tuple[int, ...] | None) -> str:
    if sizes is None:
        return "not stated"
    return ", ".join(map(str, sizes)) or "none"
