import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tacq_vllm.config import GptqConfig, Recipe
from tacq_vllm.config_methods import SpqrConfig
from tacq_vllm.quantize.gptq import quantize_matrix as quantize_gptq
from tacq_vllm.quantize.gptq import relative_error
from tacq_vllm.quantize.methods.spqr import (
    code_bits,
    quantize_matrix,
    search_threshold,
    stored_bits,
)
from tacq_vllm.quantize.methods.spqr_grid import (
    RangeGrid,
    fit_range,
    leave_one_out_gain,
    round_statistics,
)
from tacq_vllm.quantize.model import BaseModel
from tacq_vllm.quantize.result import SimulatedResult
from tacq_vllm.quantize.world import World
from tests.conftest import quick
from tests.quantize.methods.published import Layer, published, seeded_layer
from tests.quantize.methods.resuming import assert_goes_on
from tests.quantize.methods.simulated import (
    assert_simulated,
    stored_weights,
)

PUBLISHED = published("spqr")


def quantize(
    layer: Layer, bits: int, dtype: torch.dtype = torch.bfloat16, **config: Any
) -> SimulatedResult:
    return quantize_matrix(layer.W, layer.H, bits, dtype, SpqrConfig(**config), World())


@pytest.mark.parametrize("run", PUBLISHED["runs"])
def test_published_code(run: dict[str, Any]) -> None:
    """The same outliers, values and error, but for the order of additions."""
    layer = seeded_layer()

    result = quantize(
        layer,
        run["bits"],
        torch.float32,
        outlier_threshold=run["outlier_threshold"],
    )

    assert result.outliers == run["outliers"]
    weight = torch.tensor(run["weight"]).view(4, 16)
    torch.testing.assert_close(result.weight[:4, :16], weight, rtol=0, atol=5e-6)
    error = relative_error(layer.W, result.weight, layer.H)
    assert error == pytest.approx(run["error"], rel=1e-4)
    order = layer.H.diagonal().argsort(descending=True)
    assert order[:16].tolist() == run["perm"]


def with_planted_outliers() -> Layer:
    """Weights without tails, but for one of a hundred."""
    layer = seeded_layer()
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(layer.W.shape, generator=generator)
    planted = torch.rand(W.shape, generator=generator) < 0.01
    return Layer(torch.where(planted, 10 * W, W), layer.x, layer.fisher)


def test_it_beats_gptq_where_there_are_outliers() -> None:
    """For as many bits: SpQR's column order counts more in so small a matrix."""
    layer = with_planted_outliers()

    result = quantize(layer, 3, damp_percent=GptqConfig().damp_percent)

    gptq = quantize_gptq(
        layer.W,
        layer.H,
        None,
        bits=3,
        group_size=16,
        dtype=torch.bfloat16,
        keep_original=False,
        config=GptqConfig(),
    )
    packed = gptq.pack(torch.zeros_like(layer.W, dtype=torch.bool)).tensors()
    nbytes = sum(tensor.nbytes for tensor in packed.values())
    assert result.stored_bits < 1.05 * 8 * nbytes
    errors = [relative_error(layer.W, q.weight, layer.H) for q in (result, gptq)]
    assert errors[0] < 0.7 * errors[1], errors


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_the_share_of_outliers_is_that_asked_for(bits: int) -> None:
    result = quantize(seeded_layer(), bits, outlier_ratio=0.02)

    assert result.outliers / result.weight.numel() == pytest.approx(0.02, rel=0.3)


def test_without_outliers_every_group_has_few_values() -> None:
    layer = seeded_layer()

    result = quantize(layer, 2, outlier_ratio=0.0)

    assert result.outliers == 0
    order = layer.H.diagonal().argsort(descending=True, stable=True)
    groups = result.weight[:, order].view(-1, 16)
    assert max(len(group.unique()) for group in groups) <= 4


def test_leave_one_out_gain() -> None:
    """The long way: one weight out, a grid for the others, their error."""
    W, weights = seeded_layer().W[:3, :8], torch.arange(1.0, 9.0)

    gain = leave_one_out_gain(W, weights, 2)

    def error(values: torch.Tensor, weights: torch.Tensor) -> float:
        rounded = fit_range(values, 2).round(values)
        return float(((rounded - values) ** 2 * weights).sum())

    for row in range(3):
        for column in range(8):
            others = [index for index in range(8) if index != column]
            long_way = error(W[row], weights) - error(W[row, others], weights[others])
            assert float(gain[row, column]) == pytest.approx(long_way, abs=1e-6)


def test_a_grid_reaches_from_the_least_to_the_largest() -> None:
    W = torch.tensor([[0.5, 1.0, 2.0], [3.0, 3.0, 3.0]])

    grid = fit_range(W, 2)

    torch.testing.assert_close(grid.round(W)[0], torch.tensor([0.5, 1.0, 2.0]))
    assert float(grid.round(torch.tensor([[9.0], [9.0]]))[0]) == pytest.approx(2.0)


def test_statistics_lie_on_grids_of_16_bits() -> None:
    values = torch.randn(16, 1, generator=torch.Generator().manual_seed(0))

    found = round_statistics(values, 3, 16, torch.bfloat16)

    grid = fit_range(values.view(1, 16), 3)
    scales, zeros = grid.scales.bfloat16().float(), grid.zeros.bfloat16().float()
    expected = RangeGrid(scales, zeros, 7).round(values.view(1, 16)).view(16, 1)
    assert torch.equal(found, expected)
    assert not torch.equal(found, round_statistics(values, 3, 16, torch.float32))


def test_statistics_of_a_last_group_that_is_not_full() -> None:
    values = torch.arange(1.0, 21.0).unsqueeze(1)

    rounded = round_statistics(values, 3, 16, torch.float32)

    assert rounded.shape == (20, 1)
    assert len(rounded[:16].unique()) == 8
    torch.testing.assert_close(rounded[[0, 15, 16, 19]], values[[0, 15, 16, 19]])


def test_statistics_of_a_process_that_has_no_rows() -> None:
    assert round_statistics(torch.empty(0, 1), 3, 16, torch.float32).shape == (0, 1)


def test_a_threshold_is_found() -> None:
    assert search_threshold(lambda threshold: 1 / (1 + threshold), 0.2) == (
        pytest.approx(4.0, rel=0.05)
    )
    assert search_threshold(lambda threshold: 1.0, 0.0) == math.inf


def test_bits_counted_by_hand() -> None:
    # 32 rows of 2 groups of 16: codes; a scale and a zero-point per row and group; four
    # 16-bit values per 16 rows and group; the order of columns; 33 offsets, 5 entries.
    by_hand = 32 * 32 * 2 + 32 * 2 * (3 + 3) + 2 * 2 * 4 * 16 + 32 * 16 + (33 + 5) * 32

    assert stored_bits(32, 32, 2, 5, SpqrConfig()) == by_hand


def test_bits_are_those_that_its_paper_counts() -> None:
    """For a large matrix; b + 2·3/16 + 4·16/256 + 32 per outlier."""
    bits = stored_bits(4096, 4096, 3, 4096 * 41, SpqrConfig()) / 4096**2

    assert bits == pytest.approx(3 + 6 / 16 + 64 / 256 + 32 * 41 / 4096, abs=0.02)


def test_codes_have_a_bit_less_than_the_recipe_says() -> None:
    assert code_bits(Recipe(method="spqr", bits=3)) == 2
    assert code_bits(Recipe(method="spqr", bits=3, spqr=SpqrConfig(code_bits=3))) == 3


@pytest.fixture
def recipe(tiny_recipe: Recipe) -> Recipe:
    return quick(tiny_recipe, method="spqr", bits=4)


def test_a_simulated_checkpoint(
    tiny_base: BaseModel, recipe: Recipe, tmp_path: Path
) -> None:
    schema = assert_simulated(tiny_base, recipe, tmp_path, ["quantization"])

    assert (schema.bits, schema.group_size) == (3, 16)
    for name, weight in stored_weights(tmp_path / "out", schema):
        linear = schema.linears[name]
        bits = stored_bits(*weight.shape, 3, linear.outliers, recipe.spqr)
        assert linear.stored_bytes * 8 == bits
        assert 0 < linear.outliers < 0.05 * weight.numel()


def test_it_goes_on_where_it_was_interrupted(
    tiny_base: BaseModel, recipe: Recipe, tmp_path: Path
) -> None:
    assert_goes_on(tiny_base, recipe, tmp_path)
