from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from tacq_vllm.config import GptqConfig, Recipe, RecipeError, override_recipe
from tacq_vllm.config_methods import SlimLlmConfig
from tacq_vllm.quantize.errors import QuantizeError
from tacq_vllm.quantize.gptq import inverse_factor, relative_error
from tacq_vllm.quantize.methods.slim_grid import (
    fit_binary,
    fit_group,
    salient_elements,
)
from tacq_vllm.quantize.methods.slim_llm import (
    choose_bits,
    divergences,
    quantize_matrix,
    stored_bits,
)
from tacq_vllm.quantize.model import BaseModel
from tacq_vllm.quantize.result import SimulatedResult
from tacq_vllm.quantize.rounder import GroupInputs
from tacq_vllm.quantize.world import World
from tests.conftest import quick, run_pipeline
from tests.quantize.methods.published import Layer, published, seeded_layer
from tests.quantize.methods.resuming import assert_goes_on
from tests.quantize.methods.simulated import (
    assert_simulated,
    stored_weights,
)

PUBLISHED = published("slim-llm")


def quantize(
    layer: Layer, bits: int, group_size: int, dtype: torch.dtype = torch.bfloat16
) -> SimulatedResult:
    return quantize_matrix(
        layer.W,
        GroupInputs(layer.H, layer.x),
        bits=bits,
        group_size=group_size,
        dtype=dtype,
        config=SlimLlmConfig(),
        gptq=GptqConfig(),
        world=World(),
    )


def rank_groups(layer: Layer, group_size: int, damp_percent: float) -> Tensor:
    U, _ = inverse_factor(layer.H, damp_percent)
    salience = (layer.W / U.diagonal()).square().sum(0)
    return salience.view(-1, group_size).sum(1).argsort()


@pytest.mark.parametrize("run", PUBLISHED["runs"])
def test_published_code(run: dict[str, Any]) -> None:
    """The same bits, values and error, but for the order of additions."""
    layer = seeded_layer(*run["shape"])
    tokens = len(layer.x)

    # Their search adds 0.01 to the diagonal of 2 / 4 of the sum over tokens.
    damp_percent = float(0.01 / (layer.H.diagonal().mean() * tokens / 2))
    ranking = rank_groups(layer, run["group_size"], damp_percent)
    losses = divergences(layer.W, layer.x, ranking, run["bits"]) / tokens
    assert losses.tolist() == pytest.approx(run["divergences"], rel=1e-4)
    ranking = rank_groups(layer, run["group_size"], 0.01)
    assert choose_bits(ranking, losses, run["bits"]) == run["group_bits"]

    result = quantize(layer, run["bits"], run["group_size"], torch.float32)

    weight = torch.tensor(run["weight"]).view(4, 16)
    torch.testing.assert_close(result.weight[:4, :16], weight, rtol=0, atol=2e-6)
    error = relative_error(layer.W, result.weight, layer.H)
    assert error == pytest.approx(run["error"], rel=1e-3)
    assert result.stored_bits == stored_bits(
        layer.W.shape[0], run["group_size"], run["group_bits"]
    )


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_divergences_the_long_way(bits: int) -> None:
    """Each candidate's weights made anew, one column of groups at a time."""
    layer = seeded_layer()
    ranking = rank_groups(layer, 16, 0.01)

    losses = divergences(layer.W, layer.x, ranking, bits)

    target = log_softmax(layer.x @ layer.W.T, dim=1)
    for index, loss in enumerate(losses.tolist()):
        only = torch.full((len(losses),), 1.0)
        only[index] = 0.0
        widths = choose_bits(ranking, only, bits)
        groups = zip(layer.W.split(16, dim=1), widths, strict=True)
        W = torch.cat([round_simply(group, width) for group, width in groups], 1)
        found = log_softmax(layer.x @ W.T, dim=1)
        # Without the least probability, which small ones are raised to.
        expected = float((found.exp() * (found - target)).sum())
        assert loss == pytest.approx(expected, rel=0.05)


def round_simply(W: Tensor, bits: int) -> Tensor:
    if bits == 1:
        mean, size = W.mean(1, keepdim=True), W.abs().mean(1, keepdim=True)
        return (W - mean).sign() * size + mean
    low, high = W.amin(1, True).clamp(max=0.0), W.amax(1, True).clamp(min=0.0)
    scale = (high - low) / (2**bits - 1)
    zero = (-low / scale).round()
    return scale * ((W / scale).round().add(zero).clamp(0, 2**bits - 1) - zero)


def test_grids_are_stored_in_16_bits() -> None:
    W = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))
    line = torch.linspace(-4.0, 4.0, 81).expand(6, -1)

    for bits in (1, 2, 3):
        grid = fit_group(W, torch.ones(16), bits, torch.bfloat16, SlimLlmConfig(), 2.0)
        for row in grid(line):
            values = row.unique()
            steps = values.diff()
            # One bit: the mean absolute value, and the mean in the middle.
            stored = (
                steps[:1] if bits > 1 else torch.cat([steps / 2, values.mean()[None]])
            )
            assert len(values) == 2**bits
            assert torch.equal(stored, stored.bfloat16().float())


@pytest.mark.parametrize("groups", range(1, 12))
def test_the_average_is_the_recipes(groups: int) -> None:
    ranking = torch.randperm(groups, generator=torch.Generator().manual_seed(groups))
    count = max(0, groups // 2 - 1)

    for best in range(count):
        losses = torch.ones(count)
        losses[best] = 0.0
        widths = choose_bits(ranking, losses, 3)
        assert sum(widths) == 3 * groups
        assert widths.count(4) == widths.count(2) == best + 1
        assert widths[ranking[0]] == 2
        assert widths[ranking[-1]] == 4
    if count == 0:
        assert choose_bits(ranking, torch.zeros(0), 3) == [3] * groups


def test_a_searched_grid_is_no_worse_than_the_whole_range() -> None:
    W = seeded_layer().W[:, :32]
    factor = torch.ones(32)

    def error(steps: int) -> Tensor:
        config = SlimLlmConfig(search_steps=steps)
        values = fit_group(W, factor, 3, torch.bfloat16, config, 2.4)
        return (values(W) - W).abs().pow(2.4).sum(1)

    unchanged = fit_group(
        W, factor, 3, torch.bfloat16, SlimLlmConfig(search_range=0.0), 2.4
    )
    searched, before = error(50), (unchanged(W) - W).abs().pow(2.4).sum(1)
    assert bool((searched <= before).all())
    assert float(searched.sum()) < 0.98 * float(before.sum())


def test_salient_elements_weigh_more_if_asked() -> None:
    W = seeded_layer().W[:, :32]
    factor = torch.ones(32)
    salient = salient_elements(W.square(), 2.0)
    assert 0.0 < float(salient.float().mean()) < 0.1

    def error(weight: float) -> float:
        config = SlimLlmConfig(salience_weight=weight)
        values = fit_group(W, factor, 3, torch.bfloat16, config, 2.4)
        return float((values(W) - W)[salient].abs().pow(2.4).sum())

    assert error(100.0) < error(1.0)


def test_one_bit_is_the_mean_and_a_size() -> None:
    W = torch.tensor([[0.5, 2.0, 3.5, -2.0]])

    values = fit_binary(W, torch.bfloat16)(W)

    assert values.tolist() == [[-1.0, 3.0, 3.0, -1.0]]


def test_bits_counted_by_hand() -> None:
    # 10 rows, groups of 32 columns: codes, a scale, a zero-point; a mean for one bit.
    by_hand = 10 * (32 * 1 + 16 + 16) + 10 * (32 * 2 + 16 + 2) + 10 * (32 * 3 + 16 + 3)

    assert stored_bits(10, 32, [1, 2, 3]) == by_hand + 3 * 2


@pytest.fixture
def recipe(tiny_recipe: Recipe) -> Recipe:
    return quick(
        tiny_recipe, **{"method": "slim-llm", "group_size": 16, "gptq.block_size": 32}
    )


def test_a_simulated_checkpoint(
    tiny_base: BaseModel, recipe: Recipe, tmp_path: Path
) -> None:
    schema = assert_simulated(tiny_base, recipe, tmp_path, ["quantization"])

    assert (schema.bits, schema.group_size) == (3, 16)
    for name, weight in stored_weights(tmp_path / "out", schema):
        assert schema.linears[name].outliers == 0
        # Three bits on average: of 16 weights a row has 4, 8 or 16 values at most.
        most = sorted(
            max(len(row.unique()) for row in group) for group in weight.split(16, dim=1)
        )
        assert most[0] <= 4
        assert most[-1] > 8
    # Codes, and for 16 weights a scale of 16 bits and a zero-point.
    assert schema.effective_bits == pytest.approx(3 + 19 / 16, abs=0.05)


def test_it_goes_on_where_it_was_interrupted(
    tiny_base: BaseModel, recipe: Recipe, tmp_path: Path
) -> None:
    assert_goes_on(tiny_base, recipe, tmp_path)


def test_a_recipe_without_groups_is_refused(recipe: Recipe) -> None:
    with pytest.raises(RecipeError, match=r"give a group_size \(its paper: 128\)"):
        override_recipe(recipe, {"group_size": -1})


def test_groups_that_do_not_fit_are_refused_by_name(
    tiny_base: BaseModel, recipe: Recipe, tmp_path: Path
) -> None:
    other = override_recipe(recipe, {"group_size": 48})

    with pytest.raises(QuantizeError, match=r"q_proj: group_size 48 does not divide"):
        run_pipeline(tiny_base, other, tmp_path / "out", tmp_path / "work")
