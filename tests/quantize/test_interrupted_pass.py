"""A pass over the blocks that is interrupted, and the one that goes on."""

from pathlib import Path

import pytest
from torch import Tensor

from tacq_vllm.config import Recipe
from tacq_vllm.quantize.boundaries import Boundaries
from tacq_vllm.quantize.model import BaseModel
from tacq_vllm.quantize.quantized import QuantizedBlocks
from tacq_vllm.quantize.workdir import PhaseFolder, WorkDir
from tests.conftest import Recorder, assert_released, is_equal, quick
from tests.interruptions import interrupted_at_file, interrupted_at_removal
from tests.quantize.block_pass import names, quantize


@pytest.fixture
def work(tmp_path: Path) -> WorkDir:
    return WorkDir(tmp_path / "work")


def assert_same(blocks: QuantizedBlocks, others: QuantizedBlocks) -> None:
    reports = list(blocks.reports())
    assert reports == list(others.reports())
    for report in reports:
        tensors = blocks.packed(report.name).tensors()
        assert is_equal(tensors, others.packed(report.name).tensors())


@pytest.mark.parametrize(("step", "done"), [(1, 0), (7, 0), (8, 1), (14, 1)])
def test_an_interrupted_pass_goes_on(
    tiny_base: BaseModel, tiny_recipe: Recipe, work: WorkDir, step: int, done: int
) -> None:
    recipe, folder = quick(tiny_recipe), work.phase("interrupted", {})
    stop, recorder = Recorder("gptq", step), Recorder()
    with pytest.raises(KeyboardInterrupt):
        quantize(tiny_base, recipe, folder, listener=stop)
    assert_released(tiny_base)

    resumed = quantize(tiny_base, recipe, folder, listener=recorder)

    note = f"gptq: {done} of 2 blocks taken from the work folder"
    assert recorder.notes == [note] * (done > 0)
    assert recorder.phases == {"gptq": 14 - 7 * done}
    assert_same(resumed, quantize(tiny_base, recipe, work.phase("whole", {})))
    assert names(folder) == {"block-0000", "block-0001"}


def test_a_failure_to_store_leaves_no_hooks(
    tiny_base: BaseModel,
    tiny_recipe: Recipe,
    phase_folder: PhaseFolder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    save = Boundaries.save

    def fail(folder: Boundaries, boundary: int, number: int, tensor: Tensor) -> None:
        if boundary == 1:
            raise OSError("no space")
        save(folder, boundary, number, tensor)

    monkeypatch.setattr(Boundaries, "save", fail)

    # The error is kept, and with it the frames that it has passed.
    with pytest.raises(OSError, match="no space") as caught:
        quantize(tiny_base, quick(tiny_recipe), phase_folder)

    assert_released(tiny_base)
    assert caught.tb is not None


@pytest.mark.parametrize("count", range(1, 21))
def test_a_pass_goes_on_after_any_file(
    tiny_base: BaseModel, tiny_recipe: Recipe, work: WorkDir, count: int
) -> None:
    """What goes in and out of two blocks, for six batches, and the blocks."""
    recipe, folder = quick(tiny_recipe), work.phase("interrupted", {})
    with interrupted_at_file(count):
        quantize(tiny_base, recipe, folder)

    resumed = quantize(tiny_base, recipe, folder)

    assert_same(resumed, quantize(tiny_base, recipe, work.phase("whole", {})))


def test_a_pass_that_goes_on_stores_no_inputs_of_finished_blocks(
    tiny_base: BaseModel, tiny_recipe: Recipe, phase_folder: PhaseFolder
) -> None:
    recipe = quick(tiny_recipe)
    for step in (8, 1):
        with pytest.raises(KeyboardInterrupt):
            quantize(tiny_base, recipe, phase_folder, listener=Recorder("gptq", step))

    hidden = {name for name in names(phase_folder) if name.startswith("hidden")}
    assert {name.split("-")[1] for name in hidden} == {"0001"}


@pytest.mark.parametrize("count", [2, 12])
def test_what_an_interrupted_clean_up_has_left_goes(
    tiny_base: BaseModel, tiny_recipe: Recipe, phase_folder: PhaseFolder, count: int
) -> None:
    """After a block, and where none is left."""
    with interrupted_at_removal(count):
        quantize(tiny_base, quick(tiny_recipe), phase_folder)
    assert any(name.startswith("hidden") for name in names(phase_folder))

    quantize(tiny_base, quick(tiny_recipe), phase_folder)

    assert names(phase_folder) == {"block-0000", "block-0001"}


def test_what_is_stored_is_not_computed_again(
    tiny_base: BaseModel, tiny_recipe: Recipe, phase_folder: PhaseFolder
) -> None:
    quantize(tiny_base, quick(tiny_recipe), phase_folder)
    recorder = Recorder()

    quantize(tiny_base, quick(tiny_recipe), phase_folder, listener=recorder)

    assert recorder.phases == {}
    assert recorder.notes == ["gptq: 2 of 2 blocks taken from the work folder"]
