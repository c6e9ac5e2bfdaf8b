"""The `tacq` command.

Heavy modules are imported inside the commands, so that `--help` is instant.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from tacq_vllm import cli_compare, cli_convert, cli_evaluate, cli_recover, cli_show
from tacq_vllm.cli_options import (
    Calibration,
    DataRoot,
    Device,
    DeviceOption,
    InputError,
    ModelName,
    NumSamples,
    Output,
    SeqLen,
    WorkDirectory,
    apply_options,
    check_file,
    torch_device,
)
from tacq_vllm.terminal import (
    INTERRUPTED,
    INTERRUPTED_CODE,
    CommandGroup,
    ends_at_once,
    err,
    open_listener,
    print_failure,
)

app = typer.Typer(
    name="tacq",
    cls=CommandGroup,
    help="Quantize LLMs with TaCQ and look into packed checkpoints.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

CheckpointName = Annotated[
    str,
    typer.Argument(
        metavar="DIR_OR_REPO",
        help="A checkpoint folder, or a Hub id.",
        show_default=False,
    ),
]
Revision = Annotated[
    str | None, typer.Option(help="Branch, tag or commit of a repo on the Hub.")
]


class MethodOption(StrEnum):
    """Values of --method."""

    tacq = "tacq"
    gptq = "gptq"
    rtn = "rtn"
    squeezellm = "squeezellm"
    spqr = "spqr"
    slim_llm = "slim-llm"
    fineq = "fineq"


class SaliencyOption(StrEnum):
    """Values of --saliency."""

    tacq = "tacq"
    qal = "qal"
    msg = "msg"
    grad = "grad"
    fisher = "fisher"
    magnitude = "magnitude"


def main() -> None:
    """Run the command line; bad input ends in one line and exit code 2."""
    app()


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print it.")] = False,
) -> None:
    """Quantize LLMs with TaCQ and look into packed checkpoints."""
    if version:
        from tacq_vllm import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.command()
def quantize(
    model: ModelName,
    output: Output,
    recipe: Annotated[
        str | None,
        typer.Option(
            help="A ready-made recipe's name or a .yaml file; other options override "
            "it. Without it: tacq, 3 bits, a scale per row, 128 x 2048 tokens of "
            "`self`."
        ),
    ] = None,
    work_dir: WorkDirectory = None,
    bits: Annotated[int | None, typer.Option(help="2, 3 or 4.")] = None,
    group_size: Annotated[
        int | None, typer.Option(help="Columns that share a scale; -1: the row.")
    ] = None,
    outlier_ratio: Annotated[
        float | None, typer.Option(help="Share of weights kept in 16 bits.")
    ] = None,
    method: Annotated[
        MethodOption | None,
        typer.Option(help="squeezellm, spqr and slim-llm are simulated."),
    ] = None,
    saliency: Annotated[
        SaliencyOption | None, typer.Option(help="Which weights are kept.")
    ] = None,
    calibration: Calibration = None,
    data_root: DataRoot = None,
    num_samples: NumSamples = None,
    seq_len: SeqLen = None,
    seed: Annotated[int | None, typer.Option(help="Of sampling.")] = None,
    device: Device = DeviceOption.auto,
) -> None:
    """Make a packed TaCQ checkpoint of a 16-bit model."""
    with _one_line_errors():
        from tacq_vllm.config import Recipe, load_recipe

        effective = apply_options(
            load_recipe(recipe) if recipe else Recipe(),
            {
                "bits": ("--bits", bits),
                "group_size": ("--group-size", group_size),
                "method": ("--method", method),
                "outliers.ratio": ("--outlier-ratio", outlier_ratio),
                "outliers.saliency": ("--saliency", saliency),
                "calibration.sources": ("--calibration", calibration),
                "calibration.num_samples": ("--num-samples", num_samples),
                "calibration.seq_len": ("--seq-len", seq_len),
                "calibration.seed": ("--seed", seed),
            },
        )
        asks_to_keep = outlier_ratio is not None or saliency is not None
        if asks_to_keep and not effective.keeps_outliers:
            raise InputError(
                f"method {effective.method} keeps no weights by --outlier-ratio or "
                "--saliency: leave them out, or choose tacq"
            )

        from transformers.utils import logging as transformers_logging

        from tacq_vllm.hub import write_model_card
        from tacq_vllm.quantize.model import open_base_model
        from tacq_vllm.quantize.pipeline import quantize_model
        from tacq_vllm.quantize.progress import Progress as RunProgress
        from tacq_vllm.quantize.workdir import check_output, open_workdir
        from tacq_vllm.quantize.world import open_world

        check_output(output, work_dir)
        transformers_logging.disable_progress_bar()
        with open_world(torch_device(device)) as (world, own_device):
            with (
                open_workdir(work_dir, output, world) as folder,
                open_listener(world.leads) as listener,
            ):
                with world.leader_first():
                    base = open_base_model(model, own_device, folder)
                quantize_model(
                    base,
                    effective,
                    output,
                    folder,
                    RunProgress(listener),
                    lambda staged, schema: write_model_card(
                        staged, schema, base.name, base.hub_id, base.published.folder
                    ),
                    data_root,
                    world,
                )
            if world.leads:
                cli_show.print_summary(output)


@app.command()
def inspect(
    checkpoint: CheckpointName,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Draw where the kept weights sit (.png).")
    ] = None,
    revision: Revision = None,
) -> None:
    """Show effective bits, bytes and kept weights, counted from the files."""
    with _one_line_errors():
        from tacq_vllm.format.inspection import inspect_checkpoint
        from tacq_vllm.hub.pull import checkpoint_headers

        check_file("--plot", plot)
        with checkpoint_headers(checkpoint, revision) as folder:
            figures = inspect_checkpoint(folder)
        if plot is not None:
            from tacq_vllm.format.plot import plot_outliers

            folder = _whole_checkpoint(checkpoint, revision)
            try:
                plot_outliers(folder, figures, plot)
            except ValueError as error:
                raise InputError(f"{plot}: {error}") from error
        if as_json:
            typer.echo(json.dumps(cli_show.inspection_json(figures), indent=2))
        else:
            cli_show.print_inspection(figures)


@app.command()
def verify(checkpoint: CheckpointName, revision: Revision = None) -> None:
    """Name everything that a loader would refuse; exit code 1 if there is anything."""
    with _one_line_errors():
        from tacq_vllm.format.validation import find_faults

        faults = find_faults(_whole_checkpoint(checkpoint, revision))
    for fault in faults:
        typer.echo(fault)
    if faults:
        raise typer.Exit(1)
    typer.echo(f"{checkpoint}: whole")


@app.command()
def doctor(
    checkpoint: Annotated[
        Path | None,
        typer.Argument(
            metavar="DIR",
            help="A checkpoint folder: also name the kernel of each linear.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Show versions, device and kernels; exit code 1 if anything is wrong."""
    with _one_line_errors():
        from tacq_vllm.doctor import examine, linear_kernels
        from tacq_vllm.format.schema import printable

        findings = examine()
        kernels = linear_kernels(checkpoint) if checkpoint else {}
        for finding in findings:
            typer.echo(f"{finding.name:<16} {finding.value}")
        for name, kernel in kernels.items():
            typer.echo(f"{printable(name)}: {kernel}")
        faults = [fault for finding in findings for fault in finding.faults]
        for fault in faults:
            typer.echo(f"fault: {fault}")
        if faults:
            raise typer.Exit(1)


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A checkpoint folder.")],
    repo_id: Annotated[
        str, typer.Argument(metavar="REPO_ID", help="`user/name`; made if it is new.")
    ],
    private: Annotated[
        bool, typer.Option("--private", help="Make the repo private.")
    ] = False,
    revision: Annotated[
        str | None, typer.Option(help="Branch to push to; made if it is new.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show files and card; upload nothing.")
    ] = False,
) -> None:
    """Upload a checkpoint to the Hub, and make or update its model card."""
    with _one_line_errors():
        from tacq_vllm.hub.push import plan_push, upload

        _quiet_client()
        plan = plan_push(folder, repo_id, private, revision)
        if dry_run:
            cli_show.print_push(plan)
        else:
            with ends_at_once():
                address = upload(plan)
            typer.echo(address)


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """Bad input: one line that says what is wrong, exit code 2; Ctrl-C: 130."""
    from safetensors import SafetensorError

    from tacq_vllm.config import RecipeError
    from tacq_vllm.data.errors import DataError
    from tacq_vllm.evaluate.errors import EvaluateError
    from tacq_vllm.format.schema import FormatError
    from tacq_vllm.hub.errors import HubError
    from tacq_vllm.quantize.errors import QuantizeError, is_out_of_memory
    from tacq_vllm.scores import ScoresError

    ours = (FormatError, RecipeError, QuantizeError, HubError, ScoresError)
    theirs = (OSError, SafetensorError)
    expected = (*ours, DataError, EvaluateError, InputError, *theirs)
    try:
        yield
    except BrokenPipeError:
        # Who reads has seen enough (`tacq inspect DIR | head`): Typer ends quietly.
        raise
    except (*expected, MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            reason = str(error) or type(error).__name__
            _fail(
                "out of memory; give the same command again with more of it free, or "
                f"a smaller model or sequence length ({reason})"
            )
        if not isinstance(error, expected):
            raise
        _fail(_reason(error))
    except ModuleNotFoundError as error:
        _fail(f"{error}: pip install 'tacq-vllm[quantize,plots]'")
    except KeyboardInterrupt:
        _fail(INTERRUPTED, code=INTERRUPTED_CODE)


app.command("import")(_one_line_errors()(cli_convert.import_checkpoint))
app.command("recover")(_one_line_errors()(cli_recover.recover_checkpoint))
app.command("export")(_one_line_errors()(cli_convert.export_checkpoint))
app.command("evaluate")(_one_line_errors()(cli_evaluate.evaluate))
app.command("compare")(_one_line_errors()(cli_compare.compare))


def _reason(error: Exception) -> str:
    """What an error says; of one of the system, without its number."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def _fail(message: str, code: int = 2) -> None:
    print_failure(message)
    raise typer.Exit(code)


def _whole_checkpoint(checkpoint: str, revision: str | None) -> Path:
    """A checkpoint's folder; a repo of the Hub is downloaded, which is told."""
    from tacq_vllm.hub.pull import checkpoint_folder

    _quiet_client()
    with ends_at_once():
        return checkpoint_folder(
            checkpoint, revision, lambda text: err.print(text, highlight=False)
        )


def _quiet_client() -> None:
    """Without a terminal, no bars of the Hub's client between our lines."""
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if not err.is_terminal:
        disable_progress_bars()
