"""Whole trainings: what they give, and what they refuse."""

import json
import sys
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import tacq_vllm.integrations.transformers  # noqa: F401
from tacq_vllm.config import Recipe
from tacq_vllm.convert.dequantized import export_dequantized
from tacq_vllm.format.checkpoint import CheckpointReader, read_schema
from tacq_vllm.format.inspection import inspect_checkpoint
from tacq_vllm.format.schema import FormatError
from tacq_vllm.format.validation import find_faults
from tacq_vllm.quantize.errors import QuantizeError
from tacq_vllm.quantize.model import BaseModel
from tacq_vllm.quantize.progress import Progress
from tacq_vllm.recover import trainer
from tacq_vllm.recover.config import RecoverConfig
from tacq_vllm.recover.student import Student
from tests.builders import put, replace, rewrite_tensors
from tests.conftest import Recorder, TinyLlama, make_text, quick, run_pipeline
from tests.recover.conftest import STEPS, Run, train

LINEARS = 14


@pytest.fixture(scope="module")
def two_bits(
    tiny_base: BaseModel, tiny_recipe: Recipe, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A checkpoint that has lost much."""
    folder = tmp_path_factory.mktemp("two-bits")
    recipe = quick(tiny_recipe, bits=2)
    run_pipeline(tiny_base, recipe, folder / "tiny", folder / "work")
    return folder / "tiny"


@pytest.fixture(scope="module")
def trained(
    two_bits: Path,
    tiny_model: Path,
    tiny_training: RecoverConfig,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, Student, Recorder]:
    """What a training gave: the folder, the model that was trained, what was told."""
    folder, recorder = tmp_path_factory.mktemp("trained"), Recorder()
    students: list[Student] = []

    class Kept(trainer.Trainer):
        def __init__(self, student: Student, *args: object, **kwargs: object) -> None:
            students.append(student)
            super().__init__(student, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tacq_vllm.recover.pipeline.Trainer", Kept)
        output = train(
            two_bits,
            tiny_model,
            tiny_training,
            folder / "out",
            folder / "work",
            recorder,
            budget=20,
            train_outliers=True,
        )
    return output, students[0], recorder


@pytest.fixture
def run_two_bits(run: Run, two_bits: Path) -> Run:
    return partial(run, two_bits)


def losses(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "loss.jsonl").open()]


def held_out(folder: Path) -> list[float]:
    return [row["held_out"] for row in losses(folder) if "held_out" in row]


def test_it_wins_back_what_was_lost(trained):
    output, _, recorder = trained
    rows = losses(output)

    assert held_out(output)[-1] < 0.9 * held_out(output)[0]
    assert [row["step"] for row in rows] == list(range(21))
    assert [row["step"] for row in rows if "held_out" in row] == list(range(0, 21, 2))
    assert rows[-1]["tokens"] == 20 * 128
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert recorder.phases == {"teacher": 2, "training": 20, "export": LINEARS}


def test_the_result_is_a_checkpoint_like_the_one_before(
    trained, two_bits: Path, tiny_model: Path
):
    output, _, _ = trained
    before, after = read_schema(two_bits), read_schema(output)

    assert find_faults(output) == []
    assert inspect_checkpoint(output).effective_bits == (
        inspect_checkpoint(two_bits).effective_bits
    )
    assert after.model_copy(update={"recipe": before.recipe}) == before
    recover = after.recipe["recover"]
    assert {k: v for k, v in after.recipe.items() if k != "recover"} == before.recipe
    assert recover["base"] == tiny_model.name
    assert recover["train_outliers"] is True
    assert recover["calibration"]["sources"] == ["calibration.txt"]
    with CheckpointReader(two_bits) as old, CheckpointReader(output) as new:
        assert set(old) == set(new)
        same = {name for name in old if torch.equal(old.load(name), new.load(name))}
    changed = {name.rpartition(".")[2] for name in set(new) - same}
    assert changed == {"qweight", "scales", "outliers"}
    card = (output / "README.md").read_text()
    assert "| trained (DL-QAT) on | calibration.txt: 16 x 32 tokens" in card


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_was_trained_is_what_transformers_loads(
    trained, tokens: Tensor, dtype: torch.dtype
):
    output, student, _ = trained
    model = AutoModelForCausalLM.from_pretrained(output, dtype=dtype).eval()

    with torch.no_grad():
        expected = student.model(input_ids=tokens, use_cache=False).logits
        found = model(tokens).logits.float()

    # bfloat16 has 8 bits of mantissa, and activations are rounded to 8 bits there.
    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    error = (found - expected).norm() / expected.norm()
    assert float(error) < tolerance


def test_it_tells_what_a_training_was_worth(trained):
    output, _, recorder = trained
    before, after = held_out(output)[0], min(held_out(output))

    assert recorder.notes[-1].endswith(
        f" is taken: from the held-out loss of {before:.4f} to {after:.4f}"
    )


def test_it_tells_that_no_step_was_made(two_bits: Path, run_two_bits: Run):
    recorder = Recorder()

    output = run_two_bits(recorder, budget=1e-6, budget_unit="minutes")

    assert recorder.notes[-1].startswith("training: no step was made: the 16-bit")
    with CheckpointReader(two_bits) as old, CheckpointReader(output) as new:
        assert all(torch.equal(old.load(name), new.load(name)) for name in old)


@pytest.mark.parametrize("train_what", ["magnitude", "lora"])
def test_each_part_alone_wins_something_back(
    two_bits: Path, run_two_bits: Run, train_what: str
):
    output = run_two_bits(budget=10, train=train_what, lora_lr=5e-2)

    assert held_out(output)[-1] < 0.98 * held_out(output)[0]
    with CheckpointReader(two_bits) as old, CheckpointReader(output) as new:
        name = "model.layers.0.mlp.down_proj.scales"
        same = torch.equal(old.load(name), new.load(name))
    assert same == (train_what == "lora")


@pytest.mark.parametrize(
    ("rate", "part"),
    [("magnitude_lr", "scales"), ("lora_lr", "qweight"), ("outlier_lr", "outliers")],
)
def test_each_part_has_a_rate_of_its_own(
    two_bits: Path, run_two_bits: Run, rate: str, part: str
):
    rates = {"magnitude_lr": 1e-2, "lora_lr": 5e-2, "outlier_lr": 1e-2, rate: 1e-12}

    output = run_two_bits(budget=10, train_outliers=True, **rates)

    with CheckpointReader(two_bits) as old, CheckpointReader(output) as new:
        changed = {
            name.rpartition(".")[2]
            for name in old
            if not torch.equal(old.load(name), new.load(name))
        }
    assert changed == {"scales", "qweight", "outliers"} - {part}


def test_gradients_are_clipped(run_two_bits: Run):
    # Far below what Adam divides by at least.
    output = run_two_bits(budget=4, clip_norm=1e-14)

    first, *others = held_out(output)
    assert others == pytest.approx([first] * 2, abs=1e-5)


def test_without_a_base_it_trains_what_the_checkpoint_stands_for(
    two_bits: Path, run_two_bits: Run, tmp_path: Path
):
    recorder = Recorder()
    output = run_two_bits(recorder, base=None)
    export_dequantized(two_bits, tmp_path / "dense", Progress())
    with_it = run_two_bits(base=tmp_path / "dense", name="with", distill=0.0)

    assert "no base model: nothing is distilled" in recorder.notes
    assert recorder.phases == {"training": STEPS, "export": LINEARS}
    assert held_out(output)[-1] < held_out(output)[0]
    assert held_out(output) == held_out(with_it)
    recover = read_schema(output).recipe["recover"]
    assert recover["base"] is None
    assert recover["distill"] == 0.0


def test_text_that_the_model_writes_itself(run_two_bits: Run):
    choices = {"calibration.sources": ("self",), "calibration.num_samples": 4}
    recorder = Recorder()

    run_two_bits(recorder, base=None, budget=1, **choices)

    assert recorder.phases["self-generation"] == 4


def test_prompts_do_not_count(run_two_bits: Run, task_file: Path):
    def first(loss: str) -> list[float]:
        choices = {"calibration.sources": (str(task_file),), "calibration.loss": loss}
        return held_out(run_two_bits(name=loss, budget=1, **choices))

    assert first("all")[0] != first("completion")[0]


def test_it_stops_where_the_held_out_loss_gets_no_better(
    two_bits: Path, run_two_bits: Run
):
    recorder = Recorder()
    output = run_two_bits(
        recorder,
        budget=50,
        evaluate_every=1,
        patience=2,
        # Much too high: what comes of it is worse than the start.
        magnitude_lr=100.0,
        warmup=0.0,
    )

    assert len(held_out(output)) == 3
    assert min(held_out(output)) == held_out(output)[0]
    # The listener is told of all the steps that were announced.
    assert recorder.phases["training"] == 50
    assert recorder.notes[-1].startswith("training: none of 2 steps is better than")
    # The best state is the checkpoint as it was.
    with CheckpointReader(two_bits) as old, CheckpointReader(output) as new:
        assert all(torch.equal(old.load(name), new.load(name)) for name in old)


@pytest.fixture
def ticking(monkeypatch) -> None:
    """Whoever looks at the clock finds it a second later."""
    seconds = count(0.0)
    for module in ("budget", "teacher"):
        monkeypatch.setattr(
            f"tacq_vllm.recover.{module}.perf_counter", lambda: next(seconds)
        )


@pytest.mark.usefixtures("ticking")
@pytest.mark.parametrize("stopped", [False, True])
def test_minutes_end_a_training(run_two_bits: Run, stopped: bool):
    minutes = partial(run_two_bits, budget=0.5, budget_unit="minutes")
    if stopped:
        with pytest.raises(KeyboardInterrupt):
            minutes(Recorder("training", 10))

    output = minutes()

    seconds = [row["seconds"] for row in losses(output)]
    # The 16-bit model's pass counts.
    assert seconds[0] == 1.0
    assert seconds == sorted(seconds)
    # The last step may have begun just before.
    assert seconds[-2] < 30.0 <= seconds[-1]


def test_epochs_end_a_training(run_two_bits: Run):
    output = run_two_bits(budget=1, budget_unit="epochs")

    # 15 windows of 32 tokens, 4 to a step; the 16th is held out.
    assert len(losses(output)) == 1 + 4


def test_a_picture_needs_an_extra(run_two_bits: Run, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    recorder = Recorder()

    output = run_two_bits(recorder, base=None, budget=1)

    assert not (output / "loss.png").exists()
    assert "tacq-vllm[plots]" in recorder.notes[-1]
    assert find_faults(output) == []


@pytest.fixture
def refused(run: Run, two_bits: Path, tmp_path: Path) -> Callable[..., None]:
    """Training ends with a reason, and makes nothing."""

    def end(
        reason: str,
        checkpoint: Path = two_bits,
        kind: type[Exception] = QuantizeError,
        **choices: Any,
    ) -> None:
        with pytest.raises(kind, match=reason):
            run(checkpoint, **choices)
        assert not (tmp_path / "out").exists()

    return end


def test_another_base_is_refused(refused, model_copy: Path, tiny_llama: TinyLlama):
    wider = tiny_llama(torch.bfloat16, intermediate_size=96)
    refused(r"no linear .*down_proj .* \[64, 128\]: not the model", base=wider)

    name = "model.layers.0.mlp.down_proj.weight"
    rewrite_tensors(model_copy, replace(name, lambda w: -2 * w))
    refused("too far from", base=model_copy)


def test_a_damaged_checkpoint_is_refused(refused, checkpoint_copy: Path):
    name = "model.layers.0.mlp.down_proj.scales"
    rewrite_tensors(checkpoint_copy, replace(name, put(0, float("nan"))))

    refused(f"{name}: a value is not finite", checkpoint_copy, FormatError)


def test_text_for_one_sample_is_refused(refused, tmp_path: Path):
    text = tmp_path / "short.txt"
    text.write_text(make_text(2))
    choices = {"calibration.sources": (str(text),), "calibration.seq_len": 64}

    refused("one sample cannot be both", **choices)


def test_a_loss_that_is_not_finite_ends_the_run(refused):
    refused("the loss of step 2 is not finite", magnitude_lr=1e30, warmup=0.0)
