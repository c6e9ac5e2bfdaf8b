"""What holds for every method that is interrupted."""

from pathlib import Path

import pytest

from tacq_vllm.config import Recipe
from tacq_vllm.quantize.model import BaseModel
from tests.conftest import Recorder, contents, quick, run_pipeline


def assert_goes_on(base: BaseModel, recipe: Recipe, folder: Path) -> Recorder:
    """A run that was stopped in the second block ends in the same bytes.

    Gives what the second run has told.
    """
    with pytest.raises(KeyboardInterrupt):
        run_pipeline(
            base,
            recipe,
            folder / "out",
            folder / "work",
            Recorder("quantization", 9),
        )
    recorder = Recorder()

    run_pipeline(base, recipe, folder / "out", folder / "work", recorder)

    assert recorder.phases == {"quantization": 7, "export": 1}
    run_pipeline(base, recipe, folder / "whole", folder / "work2")
    assert contents(folder / "out") == contents(folder / "whole")
    return recorder


def assert_another_text_counts(base: BaseModel, recipe: Recipe, folder: Path) -> None:
    """What was found with one text is not taken for what another would give."""
    run_pipeline(base, recipe, folder / "first", folder / "work")
    recipe = quick(recipe, **{"calibration.seed": recipe.calibration.seed + 1})
    recorder = Recorder()

    run_pipeline(base, recipe, folder / "other", folder / "work", recorder)

    assert recorder.phases["gradients"] == 4
    assert recorder.phases["quantization"] == 14
