"""Trainings that were stopped."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from tacq_vllm.cli import app
from tacq_vllm.format.checkpoint import CONFIG_NAME, WEIGHTS_NAME
from tacq_vllm.quantize.blocks import BlockCalls
from tacq_vllm.quantize.workdir import PhaseFolder
from tacq_vllm.recover import pipeline, trainer
from tacq_vllm.recover.config import RecoverConfig
from tacq_vllm.recover.curve import LOSSES_NAME
from tacq_vllm.recover.state import RECORD_FIELDS, History, Record, StateFolder
from tacq_vllm.recover.teacher import Teacher
from tests.builders import write_lines
from tests.conftest import Recorder, contents
from tests.interruptions import interrupted_at_file
from tests.recover.conftest import STEPS, Run, train

PROGRAM = "from tacq_vllm.cli import main; main()"


@pytest.fixture(scope="module")
def finished(
    tiny_checkpoint: Path,
    tiny_model: Path,
    tiny_training: RecoverConfig,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A folder with `out`, what a training gave, and `work`, which belongs to it."""
    folder = tmp_path_factory.mktemp("finished")
    train(tiny_checkpoint, tiny_model, tiny_training, folder / "out", folder / "work")
    return folder


@pytest.mark.parametrize(
    ("phase", "step"),
    [("teacher", 1), ("training", 1), ("training", 3), ("training", 6), ("export", 5)],
)
def test_it_goes_on_with_equal_results(
    tiny_checkpoint: Path,
    run: Run,
    finished: Path,
    tmp_path: Path,
    phase: str,
    step: int,
):
    with pytest.raises(KeyboardInterrupt):
        run(tiny_checkpoint, Recorder(phase, step))
    assert [path.name for path in tmp_path.iterdir()] == ["work"]
    recorder = Recorder()

    assert contents(run(tiny_checkpoint, recorder)) == contents(finished / "out")
    if phase == "training":
        # State is kept at every second step, and when all are done.
        kept = step // 2 * 2
        assert recorder.phases["training"] == STEPS - min(kept, STEPS - 1)
        assert f"training: goes on from step {kept}" in recorder.notes or kept == 0


def test_the_teacher_goes_on_with_the_next_block(
    tiny_checkpoint: Path, run: Run, monkeypatch: pytest.MonkeyPatch
):
    blocks: set[int] = set()
    run_block = BlockCalls.run

    def record(calls: BlockCalls, block: torch.nn.Module, index: int, x: Tensor):
        blocks.add(index)
        return run_block(calls, block, index, x)

    monkeypatch.setattr(BlockCalls, "run", record)

    for step, found in ((1, {0}), (2, {1})):
        blocks.clear()
        with pytest.raises(KeyboardInterrupt):
            run(tiny_checkpoint, Recorder("teacher", step))
        assert blocks == found
    # Where some samples' states are stored, and where all are.
    blocks.clear()
    with interrupted_at_file(2):
        run(tiny_checkpoint)
    with pytest.raises(KeyboardInterrupt):
        run(tiny_checkpoint, Recorder("training", 0))
    assert not blocks


def test_its_time_goes_on(
    tiny_checkpoint: Path, run: Run, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(Teacher, "seconds", 1000.0)
    with pytest.raises(KeyboardInterrupt):
        run(tiny_checkpoint, Recorder("training", 3))

    output = run(tiny_checkpoint)

    lines = (output / LOSSES_NAME).read_text().splitlines()
    seconds = [json.loads(line)["seconds"] for line in lines]
    assert seconds == sorted(seconds)
    assert seconds[0] == 1000.0


def test_it_goes_on_without_a_base(tiny_checkpoint: Path, run: Run):
    with pytest.raises(KeyboardInterrupt):
        run(tiny_checkpoint, Recorder("training", 3), base=None)
    recorder = Recorder()

    run(tiny_checkpoint, recorder, base=None)

    assert "training: goes on from step 2" in recorder.notes


@pytest.mark.parametrize("count", [3, 10, 40, 60, 64, 66, 67, 68, 69, 74, 75, 77])
def test_it_goes_on_after_a_file_that_was_not_finished(
    tiny_checkpoint: Path, run: Run, finished: Path, count: int
):
    """From 4 on the teacher's, from 66 on best values and states, 77 the output."""
    with interrupted_at_file(count):
        run(tiny_checkpoint)

    assert contents(run(tiny_checkpoint)) == contents(finished / "out")


def test_a_second_run_only_exports(
    tiny_checkpoint: Path, run: Run, finished: Path, tmp_path: Path
):
    shutil.copytree(finished / "work", tmp_path / "work")
    recorder = Recorder()

    output = run(tiny_checkpoint, recorder)

    assert contents(output) == contents(finished / "out")
    assert recorder.phases == {"export": 14}
    assert not any("goes on" in note for note in recorder.notes)
    assert (output / "loss.jsonl").read_bytes() == (
        finished / "out" / "loss.jsonl"
    ).read_bytes()


def test_other_choices_find_the_text_and_the_teacher(
    tiny_checkpoint: Path, run: Run, finished: Path, tmp_path: Path
):
    shutil.copytree(finished / "work", tmp_path / "work")
    recorder = Recorder()

    run(tiny_checkpoint, recorder, rank=2)

    assert recorder.phases == {"training": STEPS, "export": 14}
    assert recorder.notes[:2] == [
        "calibration: taken from the work folder",
        "teacher: taken from the work folder",
    ]


def begins(run: Run, checkpoint: Path, phase: str, **choices: Any) -> bool:
    """Whether a run comes to a phase, where it is stopped."""
    try:
        run(checkpoint, Recorder(phase, 0), name="again", budget=1, **choices)
    except KeyboardInterrupt:
        return True
    return False


@pytest.mark.parametrize(
    ("prompt", "completion", "phase"),
    [("the new", " river again", "teacher"), ("the", " old river again", "training")],
)
def test_another_text_finds_nothing(
    tiny_checkpoint: Path,
    run: Run,
    tmp_path: Path,
    prompt: str,
    completion: str,
    phase: str,
):
    """Nor does the same one of which other tokens count."""
    path = tmp_path / "text.jsonl"
    choices = {"calibration.sources": (str(path),), "calibration.loss": "completion"}

    def write(prompt: str, completion: str) -> None:
        write_lines(path, [{"prompt": prompt, "completion": completion}] * 16)

    write("the old", " river again")
    run(tiny_checkpoint, budget=1, **choices)
    assert not begins(run, tiny_checkpoint, phase, **choices)
    shutil.rmtree(tmp_path / "again")
    write(prompt, completion)

    assert begins(run, tiny_checkpoint, phase, **choices)


def test_another_share_held_out_finds_no_teacher(tiny_checkpoint: Path, run: Run):
    run(tiny_checkpoint, budget=1)

    assert begins(run, tiny_checkpoint, "teacher", held_out=0.5)


def test_another_checkpoint_finds_no_training(
    checkpoint_copy: Path, run: Run, monkeypatch: pytest.MonkeyPatch
):
    """Nor does one that says something else of itself, nor a program with another
    record of a step."""
    run(checkpoint_copy, budget=1)
    weights, config = (checkpoint_copy / n for n in (WEIGHTS_NAME, CONFIG_NAME))
    before = weights.stat()

    os.utime(weights, (1, 1))
    assert begins(run, checkpoint_copy, "training")
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    content = config.read_text()
    config.write_text(content.replace('"seed": 0', '"seed": 1'))
    assert begins(run, checkpoint_copy, "training")
    config.write_text(content)
    monkeypatch.setattr(pipeline, "RECORD_FIELDS", [*RECORD_FIELDS, "another"])
    assert begins(run, checkpoint_copy, "training")
    monkeypatch.undo()
    assert not begins(run, checkpoint_copy, "training")


def test_values_are_the_best_when_the_state_says_so(phase_folder: PhaseFolder):
    """A run that was killed between the two files may not come to them again."""
    folder, value = StateFolder(phase_folder), torch.nn.Parameter(torch.zeros(2))
    trained, optimizer = {"m": value}, torch.optim.Adam([value])
    before = History((Record(0, 0.0, held_out=2.0),))
    after = before.add(Record(2, 1.0, held_out=1.0))
    folder.save(trained, optimizer, before)
    value.data.fill_(1.0)
    with interrupted_at_file(2):
        folder.save(trained, optimizer, after)

    found = folder.load(trained, optimizer)
    assert found.last.step == 0
    assert torch.equal(folder.best(found)["m"], torch.zeros(2))
    value.data.fill_(1.0)
    folder.save(trained, optimizer, after)
    found = folder.load(trained, optimizer)
    assert torch.equal(folder.best(found)["m"], torch.ones(2))
    assert len(list(phase_folder.folder.glob("best-*"))) == 1


def test_a_machine_of_another_precision_does_not_go_on(
    tiny_checkpoint: Path, run: Run, monkeypatch: pytest.MonkeyPatch
):
    for index, has_bf16 in enumerate((False, True)):
        monkeypatch.setattr(trainer, "_cpu_has_bf16", lambda has=has_bf16: has)
        recorder = Recorder()
        run(tiny_checkpoint, recorder, name=f"out-{index}", precision="auto", budget=2)

        assert (recorder.phases["teacher"], recorder.phases["training"]) == (2, 2)


def test_a_checkpoint_with_another_tokenizer_is_dequantized_again(
    checkpoint_copy: Path, run: Run, tmp_path: Path
):
    recorder = Recorder()
    run(checkpoint_copy, base=None, budget=1)
    path = checkpoint_copy / "tokenizer.json"
    path.write_text(path.read_text().replace('"river"', '"rivers"'))

    run(checkpoint_copy, recorder, base=None, name="other", budget=1)

    assert "calibration: taken from the work folder" not in recorder.notes
    assert recorder.phases["training"] == 1


def test_a_killed_process_goes_on(
    tiny_checkpoint: Path, tiny_model: Path, text_file: Path, tmp_path: Path
):
    """SIGKILL at some step, and the same command again."""

    def command(name: str) -> list[str]:
        options = {
            "output": tmp_path / name,
            "base": tiny_model,
            "calibration": text_file,
            "num-samples": 16,
            "seq-len": 32,
            "batch-tokens": 128,
            "steps": 24,
            "device": "cpu",
        }
        pairs = [str(part) for k, v in options.items() for part in (f"--{k}", v)]
        return ["recover", str(tiny_checkpoint), *pairs]

    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *command("out")],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        # State is kept at step 20.
        for line in process.stderr:
            if line.startswith("training 21/24"):
                process.kill()
    assert process.returncode == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == [".out.work"]

    results = {name: CliRunner().invoke(app, command(name)) for name in ("out", "all")}

    for result in results.values():
        assert result.exit_code == 0, result.stderr
        assert "4.156 effective bits" in result.stdout
    assert "training: goes on from step 20" in results["out"].stderr
    assert contents(tmp_path / "out") == contents(tmp_path / "all")
    assert not (tmp_path / ".out.work").exists()
