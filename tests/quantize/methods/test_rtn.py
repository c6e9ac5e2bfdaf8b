from pathlib import Path

import pytest
import torch

from tacq_vllm.config import GptqConfig, Recipe
from tacq_vllm.format.checkpoint import read_schema
from tacq_vllm.format.validation import find_faults
from tacq_vllm.kernels.reference import dequantize
from tacq_vllm.quantize.errors import QuantizeError
from tacq_vllm.quantize.methods.rtn import round_to_nearest
from tacq_vllm.quantize.model import BaseModel
from tests.builders import stored_weights
from tests.conftest import Recorder, assert_released, quick, run_pipeline
from tests.quantize.methods.resuming import assert_goes_on

CONFIG = GptqConfig(grid_steps=20)


def random_weight(out_features: int, in_features: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(out_features, in_features, generator=generator)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("group_size", [-1, 32])
def test_every_weight_has_the_nearest_value_of_its_grid(
    bits: int, group_size: int
) -> None:
    W = random_weight(12, 96)

    result = round_to_nearest(W, bits, group_size, torch.bfloat16, CONFIG)

    size = 96 if group_size == -1 else group_size
    scales = result.scales.float().repeat_interleave(size, dim=1)
    zeros = result.zeros.float().repeat_interleave(size, dim=1)
    values = torch.arange(2**bits)[:, None, None] - zeros
    nearest = (values * scales - W).abs().amin(0)
    torch.testing.assert_close((result.weight - W).abs(), nearest)
    packed = result.pack(torch.zeros_like(W, dtype=torch.bool))
    assert torch.equal(dequantize(packed), result.weight)


def test_a_scale_that_float16_cannot_hold_is_refused() -> None:
    W = random_weight(4, 32) * 1e7

    with pytest.raises(QuantizeError, match=r"not finite in torch\.float16"):
        round_to_nearest(W, 3, -1, torch.float16, CONFIG)


@pytest.fixture
def recipe(tiny_recipe: Recipe) -> Recipe:
    """Of a text that is not there: none is needed."""
    return quick(
        tiny_recipe, **{"method": "rtn", "calibration.sources": ("nowhere.txt",)}
    )


def test_a_checkpoint_without_any_text(
    tiny_base: BaseModel, recipe: Recipe, tmp_path: Path
) -> None:
    recorder = Recorder()

    run_pipeline(tiny_base, recipe, tmp_path / "out", tmp_path / "work", recorder)

    assert recorder.phases == {"quantization": 14, "export": 1}
    assert find_faults(tmp_path / "out") == []
    schema = read_schema(tmp_path / "out")
    assert set(schema.circuits["default"].values()) == {0}
    card = (tmp_path / "out" / "README.md").read_text()
    assert "# tiny-llama, RTN 3 bits\n" in card
    assert "quantized with rounding to nearest" in card
    assert "| calibration data | none |" in card
    for name, weight in stored_weights(tmp_path / "out").items():
        expected = round_to_nearest(
            tiny_base.weight(name), 3, 32, torch.bfloat16, recipe.gptq
        )
        assert torch.equal(weight, expected.weight)
    assert_released(tiny_base)


def test_it_goes_on_where_it_was_interrupted(
    tiny_base: BaseModel, recipe: Recipe, tmp_path: Path
) -> None:
    recorder = assert_goes_on(tiny_base, recipe, tmp_path)

    note = "quantization: 1 of 2 blocks taken from the work folder"
    assert recorder.notes == [note]
