from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tacq_vllm.config import Recipe
from tacq_vllm.config_methods import SqueezeLlmConfig
from tacq_vllm.quantize.kmeans import nearest_centers, weighted_kmeans
from tacq_vllm.quantize.methods.squeezellm import (
    distance_from_quartiles,
    most_sensitive,
    quantize_rows,
    stored_bits,
)
from tacq_vllm.quantize.model import BaseModel
from tests.conftest import quick
from tests.quantize.methods.published import Layer, published, seeded_layer
from tests.quantize.methods.resuming import assert_another_text_counts, assert_goes_on
from tests.quantize.methods.simulated import (
    assert_simulated,
    stored_weights,
)

PUBLISHED = published("squeezellm")


def loss(values: Tensor, weights: Tensor, quantized: Tensor) -> float:
    return float((weights * (values - quantized) ** 2).double().sum())


def least_loss(values: Tensor, weights: Tensor, clusters: int) -> float:
    """Of one row, by dynamic programming over all intervals."""
    ordered, order = values.double().sort()
    weights = weights.double()[order]
    sums = [
        torch.cat([torch.zeros(1), (weights * ordered**power).cumsum(0)])
        for power in range(3)
    ]
    mass, moment, square = (s[None, :] - s[:, None] for s in sums)
    cost = torch.where(mass > 0, square - moment**2 / mass, 0.0)
    cost = torch.where(torch.ones_like(cost).triu() > 0, cost, torch.inf)
    best = cost[0]
    for _ in range(clusters - 1):
        best = (best[:, None] + cost).amin(0)
    return float(best[-1])


@pytest.mark.parametrize("clusters", [4, 8, 16])
def test_kmeans_is_near_the_least_loss_that_there_is(clusters: int) -> None:
    layer = seeded_layer(out_features=16)

    centers = weighted_kmeans(layer.W, layer.fisher, clusters, 50)

    found = nearest_centers(layer.W, centers)
    least = sum(
        least_loss(row, weights, clusters)
        for row, weights in zip(layer.W, layer.fisher, strict=True)
    )
    ratio = loss(layer.W, layer.fisher, found) / least
    assert 1 - 1e-6 < ratio < 1.15, ratio
    assert torch.equal(centers, centers.sort(1).values)


@pytest.mark.parametrize("seed", range(5))
def test_kmeans_is_never_worse_than_evenly_spaced_values(seed: int) -> None:
    layer = seeded_layer(seed=seed)

    found = nearest_centers(layer.W, weighted_kmeans(layer.W, layer.fisher, 8, 1))

    low, high = layer.W.amin(1, keepdim=True), layer.W.amax(1, keepdim=True)
    even = low + (high - low) * (torch.arange(8) + 0.5) / 8
    spaced = nearest_centers(layer.W, even)
    for row in range(64):
        one = slice(row, row + 1)
        after, before = (
            loss(layer.W[one], layer.fisher[one], q[one]) for q in (found, spaced)
        )
        assert after <= before


def test_kmeans_takes_the_start_that_ends_best() -> None:
    layer = seeded_layer(seed=1)
    W, weights = layer.W, layer.fisher
    shares = (torch.arange(8) + 0.5) / 8
    low, high = W.amin(1, keepdim=True), W.amax(1, keepdim=True)
    quantiles = W.sort(1).values[:, (shares * W.shape[1]).long()]

    def row_losses(quantized: Tensor) -> Tensor:
        return (weights * (W - quantized) ** 2).double().sum(1)

    found = row_losses(nearest_centers(W, weighted_kmeans(W, weights, 8, 50)))

    for centers in (low + (high - low) * shares, quantiles):
        for _ in range(50):
            index = (W.unsqueeze(2) - centers.unsqueeze(1)).abs().argmin(2)
            mass = torch.zeros_like(centers).scatter_add(1, index, weights)
            moment = torch.zeros_like(centers).scatter_add(1, index, weights * W)
            centers = torch.where(mass > 0, moment / mass, centers)
        assert bool((found <= row_losses(nearest_centers(W, centers)) * 1.0001).all())


def test_kmeans_of_few_different_values_is_exact() -> None:
    values = torch.tensor([[3.0, 1.0, 1.0, 2.0, 3.0, 3.0], [0.0, 0, 0, 0, 0, 5.0]])
    weights = torch.tensor([[1.0, 2.0, 0.5, 1.0, 1.0, 4.0], [0.0] * 6])

    centers = weighted_kmeans(values, weights, 4, 50)

    assert torch.equal(nearest_centers(values, centers), values)


def test_a_rows_centers_do_not_depend_on_other_rows() -> None:
    layer = seeded_layer()

    together = weighted_kmeans(layer.W, layer.fisher, 8, 50)

    alone = weighted_kmeans(layer.W[40:42], layer.fisher[40:42], 8, 50)
    torch.testing.assert_close(alone, together[40:42], rtol=1e-6, atol=0)


def kept_as_published(layer: Layer, run: dict[str, Any]) -> Tensor:
    """Far-out weights, and the most sensitive: their code leaves the last one of these
    out, for it asks for more than the threshold."""
    quantiles = layer.W.flatten().quantile(torch.tensor([0.25, 0.75]))
    spread = quantiles[1] - quantiles[0]
    threshold = max(abs(quantiles[0] - 2.5 * spread), quantiles[1] + 2.5 * spread)
    assert float(threshold) == pytest.approx(run["threshold"], rel=1e-5)
    sensitive = most_sensitive(layer.fisher, 0.0025)
    last = layer.fisher.masked_fill(~sensitive, torch.inf).argmin()
    sensitive.view(-1)[last] = False
    return sensitive | (distance_from_quartiles(layer.W) >= 2.5)


@pytest.mark.parametrize(
    "run", PUBLISHED["runs"], ids=lambda r: f"{r['bits']}{r['seed']}"
)
def test_published_code(run: dict[str, Any]) -> None:
    """The same weights kept; a loss as low as theirs, to 2 %."""
    layer = seeded_layer(seed=run["seed"])
    kept = kept_as_published(layer, run)
    assert int(kept.sum()) == run["kept"]
    assert kept[0].nonzero()[:, 0].tolist() == run["kept_columns_of_row_0"]

    quantized = quantize_rows(
        layer.W, layer.fisher, kept, run["bits"], torch.float32, SqueezeLlmConfig()
    )

    assert torch.equal(quantized[kept], layer.W[kept])
    assert loss(layer.W, layer.fisher, quantized) < 1.02 * run["loss"]
    values = [
        len(row[~mask].unique()) for row, mask in zip(quantized, kept, strict=True)
    ]
    assert max(values) <= 2 ** run["bits"]


def test_sensitive_weights_are_the_share_asked_for() -> None:
    fisher = seeded_layer().fisher

    mask = most_sensitive(fisher, 0.01)

    assert int(mask.sum()) == int(0.01 * fisher.numel())
    assert float(fisher[mask].min()) >= float(fisher[~mask].max())


def test_bits_counted_by_hand() -> None:
    # 2 rows of 3 codes of 2 bits, 4 values of 16 bits each, 3 offsets and 1 entry.
    assert stored_bits(2, 3, 2, 1) == 2 * 3 * 2 + 2 * 4 * 16 + (3 + 1) * 32


@pytest.fixture
def recipe(tiny_recipe: Recipe) -> Recipe:
    ratios = {"squeezellm.sensitive_ratio": 0.002, "squeezellm.outlier_ratio": 0.01}
    return quick(tiny_recipe, **{"method": "squeezellm", "bits": 2, **ratios})


def test_a_simulated_checkpoint(
    tiny_base: BaseModel, recipe: Recipe, tmp_path: Path
) -> None:
    schema = assert_simulated(
        tiny_base, recipe, tmp_path, ["gradients", "quantization"]
    )

    assert schema.group_size == -1
    weights = {name: tiny_base.weight(name) for name in schema.linears}
    far_out = torch.cat(
        [distance_from_quartiles(W).flatten() for W in weights.values()]
    )
    least = far_out.topk(int(0.01 * far_out.numel())).values[-1]
    for name, stored in stored_weights(tmp_path / "out", schema):
        linear, W = schema.linears[name], weights[name]
        sensitive = int(0.002 * W.numel())
        kept = distance_from_quartiles(W) >= least
        assert torch.equal(stored[kept], W[kept])
        assert 0 <= linear.outliers - max(sensitive, int(kept.sum())) <= sensitive
        assert linear.stored_bytes * 8 == stored_bits(*W.shape, 2, linear.outliers)
        different = [len(row.unique()) for row in stored]
        assert max(different) <= 4 + max((stored == W).sum(1).tolist())


def test_it_goes_on_where_it_was_interrupted(
    tiny_base: BaseModel, recipe: Recipe, tmp_path: Path
) -> None:
    assert_goes_on(tiny_base, recipe, tmp_path)


def test_another_text_finds_nothing(
    tiny_base: BaseModel, recipe: Recipe, tmp_path: Path
) -> None:
    assert_another_text_counts(tiny_base, recipe, tmp_path)
