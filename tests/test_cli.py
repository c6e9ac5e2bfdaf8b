"""What all commands have in common."""

import json
import signal
import subprocess
import sys
from io import StringIO
from pathlib import Path
from time import perf_counter
from typing import Any

import pytest
from rich.console import Console
from rich.progress import Progress
from typer.main import get_command
from typer.testing import CliRunner, Result

from tacq_vllm import __version__
from tacq_vllm.cli import app
from tacq_vllm.cli_options import DeviceOption, split_names, torch_device
from tacq_vllm.config import Recipe
from tacq_vllm.quantize.progress import Progress as RunProgress
from tacq_vllm.recover.config import RecoverConfig
from tacq_vllm.terminal import LogListener, RichListener, ends_at_once, print_failure
from tests.builders import quantize_arguments

TACQ = Path(sys.executable).parent / "tacq"
COMMANDS = [
    "quantize",
    "recover",
    "evaluate",
    "compare",
    "inspect",
    "verify",
    "push",
    "doctor",
    "import",
    "export",
]


def tacq(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def assert_one_line(result: Result, reason: str) -> None:
    """Exit code 2, one line that says what is wrong, and nothing else."""
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == 2
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("tacq: ")
    assert reason in line


def test_help_is_instant() -> None:
    seconds = []
    for _ in range(3):
        start = perf_counter()
        result = subprocess.run(
            [TACQ, "--help"], capture_output=True, text=True, check=False
        )
        seconds.append(perf_counter() - start)

    # The fastest, for others may be at work on the machine.
    assert min(seconds) < 2
    assert result.returncode == 0
    for command in COMMANDS:
        assert command in result.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_commands(command: str) -> None:
    result = tacq(command, "--help")

    assert result.exit_code == 0
    assert "Usage" in result.stdout


def test_help_tells_the_choices_that_a_recipe_leaves() -> None:
    words = {}
    for command in ("quantize", "recover"):
        (recipe,) = (
            p for p in get_command(app).commands[command].params if p.name == "recipe"
        )
        words[command] = recipe.help.split(" Without it: ")[1]
    chosen, trained = Recipe(), RecoverConfig()

    assert chosen.group_size == -1
    assert chosen.calibration == trained.calibration
    assert words["quantize"] == (
        f"{chosen.method}, {chosen.bits} bits, a scale per row, "
        f"{chosen.calibration.num_samples} x {chosen.calibration.seq_len} tokens of "
        f"`{' '.join(chosen.calibration.sources)}`."
    )
    assert trained.budget_unit == "epochs"
    assert words["recover"] == (
        f"{trained.train}, {trained.budget:g} epoch, steps of {trained.batch_tokens} "
        f"tokens, {trained.distill} distilled, calibration as of `quantize`."
    )


@pytest.mark.parametrize(
    ("command", "defaults"),
    [
        ("evaluate", {"backend": "hf", "dtype": "float32", "dequantize": False}),
        (
            "compare",
            {
                "methods": "gptq,tacq",
                "bits": "3",
                "group_size": "64",
                "calibration": "wikitext2",
                "seeds": "0",
                "num_samples": 64,
                "seq_len": 512,
            },
        ),
    ],
)
def test_what_scores_depend_on_unless_it_is_said(
    command: str, defaults: dict[str, object]
) -> None:
    common = {"window": 1024, "max_length": 4096, "limit": None, "device": "auto"}
    chosen = {p.name: p.default for p in get_command(app).commands[command].params}

    expected = defaults | common
    assert {name: chosen[name] for name in expected} == expected


def test_every_option_and_argument_is_explained() -> None:
    for name, command in get_command(app).commands.items():
        for parameter in command.params:
            assert parameter.help, f"{name}: {parameter.name}"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["bogus"], "No such command 'bogus'; see tacq --help"),
        (["--bogus"], "No such option: --bogus; see tacq --help"),
        (["quantize", "model"], "Missing option '--output'; see tacq quantize --help"),
        (["quantize", "model", "--output"], "see tacq --help"),
        (["quantize", "model", "--output", "o", "--bits", "x"], "value for '--bits'"),
        (["recover", "model", "--output", "o", "--train", "x"], "'--train': 'x' is"),
        (["push", "model"], "Missing argument 'REPO_ID'; see tacq push --help"),
    ],
)
def test_what_is_no_command_is_told_in_one_line(
    arguments: list[str], reason: str
) -> None:
    assert_one_line(tacq(*arguments), reason)


def test_nothing_given_prints_the_help() -> None:
    result = tacq()

    assert result.exit_code == 2
    assert "Usage" in result.stdout
    assert result.stderr == ""


def test_version() -> None:
    assert tacq("--version").stdout == f"{__version__}\n"


def test_an_error_of_the_system(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("data")
    arguments = quantize_arguments(tiny_model, tmp_path / "out", tiny_model)

    result = tacq(*arguments, "--work-dir", tmp_path / "file")

    assert_one_line(result, f"tacq: {tmp_path / 'file'}: Not a directory")


def test_notes_and_phases_on_a_terminal() -> None:
    shown = StringIO()
    console = Console(file=shown, force_terminal=True, width=120)

    with Progress(*Progress.get_default_columns(), console=console) as bars:
        progress = RunProgress(RichListener(bars))
        progress.note("gradients: [taken] from the work folder")
        with progress.phase("quantization", 14) as phase:
            phase.advance(14, "model.layers.0")

    assert "gradients: [taken] from the work folder" in shown.getvalue()
    assert "quantization" in shown.getvalue()
    assert "100%" in shown.getvalue()


def test_steps_and_the_time_left_in_a_log(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    times = iter([0.0, 10.0, 30.0])
    monkeypatch.setattr("tacq_vllm.terminal.perf_counter", lambda: next(times))

    with RunProgress(LogListener()).phase("quantization", 4) as phase:
        phase.advance(1, "[first]")
        phase.advance(2)

    assert capsys.readouterr().err.splitlines()[:3] == [
        "quantization: 4 steps",
        "quantization 1/4  [first]  30 s left",
        "quantization 3/4  10 s left",
    ]


def test_a_failure_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    print_failure("[two]\n  lines\n")

    assert capsys.readouterr().err == "tacq: [two] lines\n"


@pytest.mark.parametrize("before", [signal.SIG_IGN, signal.default_int_handler])
def test_ctrl_c_is_heard_only_by_who_hears_it_anyway(before: Any) -> None:
    own = signal.signal(signal.SIGINT, before)
    try:
        with ends_at_once():
            within = signal.getsignal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is before
    finally:
        signal.signal(signal.SIGINT, own)

    assert (within is before) is (before is signal.SIG_IGN)


@pytest.mark.parametrize(("option", "kind"), [("auto", "cuda"), ("cpu", "cpu")])
def test_a_device_is_what_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, option: str, kind: str
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)

    assert torch_device(DeviceOption(option)).type == kind


def test_names_with_commas_count_once() -> None:
    assert split_names("gptq, rtn,,gptq,") == ["gptq", "rtn"]


def test_an_extra_that_is_not_installed(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)

    result = tacq("inspect", tiny_checkpoint, "--plot", tmp_path / "kept.png")

    assert_one_line(result, "pip install 'tacq-vllm[")


def test_every_command_knows_clusters(tiny_model: Path, tmp_path: Path) -> None:
    output, dense = tmp_path / "out", tmp_path / "dense"
    clusters = {"method": "fineq", "bits": 2, "group_size": -1}

    result = tacq(*quantize_arguments(tiny_model, output, **clusters))

    assert result.exit_code == 0, result.output
    assert "(2.333 by the paper's formula), 0 weights kept" in result.stdout
    text = tacq("inspect", output).stdout
    assert "2.33 bits, a scale per row, bfloat16" in text
    figures = json.loads(tacq("inspect", output, "--json").stdout)
    assert (figures["layout"], figures["bits"]) == ("clusters", 2)
    assert figures["code_bits"] == pytest.approx(7 / 3)
    assert tacq("verify", output).exit_code == 0
    result = tacq("export", output, "--to", "dequantized", "--output", dense)
    assert result.exit_code == 0, result.output
    assert "(2.33 bits)" in (dense / "README.md").read_text()
