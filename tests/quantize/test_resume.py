"""Runs that were stopped, and runs that find what others have left."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers.normalizers import Replace

from tacq_vllm.config import Recipe, override_recipe
from tacq_vllm.format.validation import find_faults
from tacq_vllm.quantize import passes
from tacq_vllm.quantize.depends import common_depends, digest
from tacq_vllm.quantize.errors import QuantizeError
from tacq_vllm.quantize.model import BaseModel
from tacq_vllm.quantize.quantized import REPORT_FIELDS
from tacq_vllm.quantize.workdir import fingerprint
from tacq_vllm.quantize.world import World
from tests.builders import truncate
from tests.conftest import (
    Recorder,
    assert_released,
    contents,
    make_text,
    open_model,
    quick,
    run_pipeline,
)
from tests.interruptions import interrupted_at_file

PHASES = {
    "self-generation": 3,
    "plain quantization": 14,
    "gradients": 4,
    "quantization": 14,
    "export": 1,
}
STEPS = [(phase, step + 1) for phase, count in PHASES.items() for step in range(count)]
STEPS = STEPS[2:]
"""What the model writes itself is one batch."""
FOUND = {
    "calibration": "calibration: taken from the work folder",
    "plain": "plain quantization: 2 of 2 blocks taken from the work folder",
    "gradients": "gradients: taken from the work folder",
    "quantization": "quantization: 2 of 2 blocks taken from the work folder",
}


@pytest.fixture(scope="module")
def recipe(tiny_recipe: Recipe, task_file: Path) -> Recipe:
    """Samples of many lengths, and one that the model writes itself."""
    fields = {
        "calibration.sources": (str(task_file), "self"),
        "calibration.loss": "completion",
        "calibration.num_samples": 6,
        "calibration.seq_len": 30,
        "export.max_shard_bytes": 20_000,
    }
    return quick(tiny_recipe, **fields)


@pytest.fixture(scope="module")
def finished(
    tiny_base: BaseModel, recipe: Recipe, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder with `out`, a whole checkpoint, and `work`, which belongs to it."""
    folder = tmp_path_factory.mktemp("finished")
    recorder = Recorder()
    run_pipeline(tiny_base, recipe, folder / "out", folder / "work", recorder)
    assert recorder.phases == PHASES
    return folder


@pytest.fixture
def work(finished: Path, tmp_path: Path) -> Path:
    """A copy of the work folder of a finished run."""
    return Path(shutil.copytree(finished / "work", tmp_path / "work"))


def run(
    base: BaseModel, recipe: Recipe, work: Path, listener: Recorder | None = None
) -> dict[str, bytes]:
    """The checkpoint of a run in a work folder, which is made beside it."""
    output = work.parent / "out"
    run_pipeline(base, recipe, output, work, listener)
    return contents(output)


def run_afresh(base: BaseModel, recipe: Recipe, folder: Path) -> dict[str, bytes]:
    return run(base, recipe, folder / "afresh" / "work")


@pytest.mark.parametrize(("phase", "step"), STEPS)
def test_a_run_goes_on_where_it_was_interrupted(
    tiny_base: BaseModel,
    recipe: Recipe,
    finished: Path,
    tmp_path: Path,
    phase: str,
    step: int,
) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tiny_base, recipe, tmp_path / "work", Recorder(phase, step))
    assert [path.name for path in tmp_path.iterdir()] == ["work"]
    assert_released(tiny_base)
    recorder = Recorder()

    resumed = run(tiny_base, recipe, tmp_path / "work", recorder)

    assert resumed == contents(finished / "out")
    # No phase that had ended begins again; the last sums are stored before it is told.
    ended = list(PHASES).index(phase) + ((phase, step) == ("gradients", 4))
    assert list(recorder.phases) == list(PHASES)[ended:]


@pytest.mark.parametrize("count", range(1, 60, 13))
def test_a_run_goes_on_after_a_file_that_was_not_finished(
    tiny_base: BaseModel, recipe: Recipe, finished: Path, tmp_path: Path, count: int
) -> None:
    with interrupted_at_file(count):
        run(tiny_base, recipe, tmp_path / "work")

    assert run(tiny_base, recipe, tmp_path / "work") == contents(finished / "out")


def test_a_second_run_only_exports(
    tiny_base: BaseModel, recipe: Recipe, finished: Path, work: Path
) -> None:
    recorder = Recorder()

    assert run(tiny_base, recipe, work, recorder) == contents(finished / "out")
    assert recorder.phases == {"export": 1}
    assert recorder.notes == list(FOUND.values())


def test_another_ratio_finds_all_but_the_last_pass(
    tiny_base: BaseModel, recipe: Recipe, work: Path, tmp_path: Path
) -> None:
    other, recorder = override_recipe(recipe, {"outliers.ratio": 0.02}), Recorder()

    found = run(tiny_base, other, work, recorder)

    assert recorder.phases == {"quantization": 14, "export": 1}
    assert recorder.notes[:3] == [
        FOUND[key] for key in ("calibration", "plain", "gradients")
    ]
    assert recorder.notes[3:] == ["gptq: computed anew: outliers changed"]
    assert found == run_afresh(tiny_base, other, tmp_path)


def test_two_ratios_find_a_pass_each(
    tiny_base: BaseModel, recipe: Recipe, work: Path, tmp_path: Path
) -> None:
    """What the other has changed is not told where nothing is computed."""
    other, recorder = override_recipe(recipe, {"outliers.ratio": 0.02}), Recorder()
    run_pipeline(tiny_base, other, tmp_path / "other", work)

    run(tiny_base, recipe, work, recorder)

    assert recorder.notes == list(FOUND.values())


def test_other_bits_find_the_gradients(
    tiny_base: BaseModel, recipe: Recipe, work: Path, tmp_path: Path
) -> None:
    other, recorder = override_recipe(recipe, {"bits": 2}), Recorder()

    found = run(tiny_base, other, work, recorder)

    assert list(recorder.phases) == ["plain quantization", "quantization", "export"]
    assert recorder.notes == [
        FOUND["calibration"],
        "gptq: computed anew: bits was 3, is 2",
        FOUND["gradients"],
        "gptq: computed anew: bits was 3, is 2; outliers changed",
    ]
    assert found == run_afresh(tiny_base, other, tmp_path)


def test_another_score_finds_the_gradients(
    tiny_base: BaseModel, recipe: Recipe, work: Path, tmp_path: Path
) -> None:
    other, recorder = override_recipe(recipe, {"outliers.saliency": "msg"}), Recorder()

    found = run(tiny_base, other, work, recorder)

    assert list(recorder.phases) == ["quantization", "export"]
    assert FOUND["gradients"] in recorder.notes
    assert found == run_afresh(tiny_base, other, tmp_path)


def test_squared_gradients_are_others(
    tiny_base: BaseModel, recipe: Recipe, work: Path
) -> None:
    other, recorder = (
        override_recipe(recipe, {"outliers.saliency": "fisher"}),
        Recorder(),
    )

    run(tiny_base, other, work, recorder)

    assert list(recorder.phases) == ["gradients", "quantization", "export"]
    assert "gradients: computed anew: power was 1, is 2" in recorder.notes


def test_another_loss_finds_the_plain_pass(
    tiny_base: BaseModel, recipe: Recipe, work: Path, tmp_path: Path
) -> None:
    other = override_recipe(recipe, {"calibration.loss": "all"})
    recorder = Recorder()

    found = run(tiny_base, other, work, recorder)

    # The samples are the same, but what counts in them is not.
    assert "plain quantization" not in recorder.phases
    assert "gradients" in recorder.phases
    assert found == run_afresh(tiny_base, other, tmp_path)


def test_plain_gptq_finds_the_first_pass_of_tacq(
    tiny_base: BaseModel, recipe: Recipe, work: Path, tmp_path: Path
) -> None:
    other, recorder = override_recipe(recipe, {"method": "gptq"}), Recorder()

    found = run(tiny_base, other, work, recorder)

    assert recorder.phases == {"export": 1}
    assert recorder.notes == [FOUND["calibration"], FOUND["quantization"]]
    assert found == run_afresh(tiny_base, other, tmp_path)


def test_reports_of_another_version_are_not_read(
    tiny_base: BaseModel,
    recipe: Recipe,
    finished: Path,
    work: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(passes, "REPORT_FIELDS", [*REPORT_FIELDS, "another"])
    recorder = Recorder()

    assert run(tiny_base, recipe, work, recorder) == contents(finished / "out")
    assert list(recorder.phases) == ["plain quantization", "quantization", "export"]
    assert "gptq: computed anew: report changed" in recorder.notes


def test_another_program_or_machine_finds_nothing(
    tiny_base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = replace(tiny_base, device=torch.device("meta"))
    seen = [
        common_depends(tiny_base, World()),
        common_depends(elsewhere, World()),
        common_depends(tiny_base, World(0, 2)),
    ]
    for module in ("tacq_vllm.quantize.depends", "torch", "transformers"):
        with monkeypatch.context() as patch:
            patch.setattr(f"{module}.__version__", "another")
            seen.append(common_depends(tiny_base, World()))

    assert len(set(map(fingerprint, seen))) == len(seen)
    # All processes of a run look in the same place.
    assert common_depends(tiny_base, World(1, 2)) == seen[2]


def test_digests_tell_where_parts_end() -> None:
    parts = [(b"ab", b"c"), (b"a", b"bc"), (b"abc",), (b"abc", b"")]

    assert len(set(map(digest, parts))) == len(parts)


def test_another_text_finds_nothing(
    tiny_base: BaseModel, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    recipe = quick(tiny_recipe, **{"calibration.sources": (str(text),)})
    text.write_text(make_text())
    run_pipeline(tiny_base, recipe, tmp_path / "first", tmp_path / "work")
    text.write_text(make_text().replace("river", "city"))
    recorder = Recorder()

    found = run(tiny_base, recipe, tmp_path / "work", recorder)

    phases = ["plain quantization", "gradients", "quantization", "export"]
    assert list(recorder.phases) == phases
    assert (
        "gradients: computed anew: scored changed; tokens changed" in (recorder.notes)
        or "gradients: computed anew: tokens changed" in recorder.notes
    )
    assert found == run_afresh(tiny_base, recipe, tmp_path)


def test_another_tokenizer_finds_no_text(
    model_copy: Path, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    """Though it has the same words."""
    base = open_model(model_copy, tmp_path / "opened")
    recipe, work = quick(tiny_recipe, method="gptq"), tmp_path / "work"
    run_pipeline(base, recipe, tmp_path / "first", work)
    backend, recorder, other = base.tokenizer.backend_tokenizer, Recorder(), Recorder()

    backend.enable_truncation(4)
    run_pipeline(base, recipe, tmp_path / "again", work, recorder)
    backend.normalizer = Replace("river", "city")
    run_pipeline(base, recipe, tmp_path / "other", work, other)

    assert recorder.notes[0] == "calibration: taken from the work folder"
    assert other.notes == ["gptq: computed anew: tokens changed"]


def test_another_model_finds_nothing(
    model_copy: Path, recipe: Recipe, work: Path, tmp_path: Path
) -> None:
    """Though all its values are the same."""
    os.utime(model_copy / "model.safetensors", (1, 1))
    base, recorder = open_model(model_copy, tmp_path / "opened"), Recorder()

    run(base, recipe, work, recorder)

    assert recorder.phases == PHASES
    assert "gptq: computed anew: model changed" in recorder.notes


@pytest.mark.parametrize("phase", ["gradients", "quantization"])
def test_files_that_were_removed_by_hand_fail_by_name(
    tiny_base: BaseModel, recipe: Recipe, tmp_path: Path, phase: str
) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tiny_base, recipe, tmp_path / "work", Recorder(phase, PHASES[phase] - 1))
    for path in (tmp_path / "work").rglob("hidden-*"):
        path.unlink()

    with pytest.raises(QuantizeError, match=r"hidden-\d+-\d+\.safetensors"):
        run(tiny_base, recipe, tmp_path / "work")
    assert [path.name for path in tmp_path.iterdir()] == ["work"]


def test_the_last_block_does_not_come_back_without_those_before(
    tiny_base: BaseModel, recipe: Recipe, work: Path
) -> None:
    """What it was quantized on is not there any more."""
    for path in work.rglob("block-0001.safetensors"):
        path.unlink()

    with pytest.raises(QuantizeError, match=r"hidden-0001-\d+\.safetensors"):
        run(tiny_base, recipe, work)
    assert not (work.parent / "out").exists()


@pytest.mark.parametrize("name", ["block-0000", "calibration"])
def test_results_that_were_removed_by_hand_are_computed_again(
    tiny_base: BaseModel, recipe: Recipe, finished: Path, work: Path, name: str
) -> None:
    for path in work.rglob(f"{name}.safetensors"):
        path.unlink()

    assert run(tiny_base, recipe, work) == contents(finished / "out")


def test_a_damaged_file_is_named_with_its_remedy(
    tiny_base: BaseModel, recipe: Recipe, work: Path
) -> None:
    path = next(work.rglob("sums-0000.safetensors"))
    truncate(path, 100)
    other = override_recipe(recipe, {"outliers.ratio": 0.02})

    with pytest.raises(QuantizeError, match=rf"sums-0000.*delete {path.parent}"):
        run(tiny_base, other, work)
    shutil.rmtree(path.parent)
    assert find_faults(work.parent / "out") != []
    run(tiny_base, other, work)
    assert find_faults(work.parent / "out") == []
