from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tacq_vllm.config import GptqConfig
from tacq_vllm.kernels.reference import dequantize
from tacq_vllm.quantize.clusters import fit_scales, round_to_clusters
from tacq_vllm.quantize.clusters_gptq import compensate_clusters
from tacq_vllm.quantize.errors import QuantizeError
from tacq_vllm.quantize.gptq import inverse_factor, relative_error
from tacq_vllm.quantize.result import ClusterResult
from tests.quantize.test_gptq import (
    assert_rows_improve,
    random_mask,
    random_weight,
)
from tests.quantize.test_hessian import correlated_hessian

CONFIG = GptqConfig(grid_steps=20)


def compensate(
    W: Tensor,
    H: Tensor,
    kept: Tensor | None = None,
    group_size: int = -1,
    keep_original: bool = True,
    dtype: torch.dtype = torch.bfloat16,
    **config: Any,
) -> ClusterResult:
    return compensate_clusters(
        W,
        H,
        kept,
        group_size=group_size,
        dtype=dtype,
        keep_original=keep_original,
        config=CONFIG.model_copy(update=config),
    )


@given(
    shape=st.sampled_from([(-1, 5), (-1, 40), (-1, 96), (-1, 130), (96, 192)]),
    density=st.sampled_from([0.0, 0.05, 0.5]),
    keep_original=st.booleans(),
    activation_order=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_what_is_found_can_be_stored(
    shape: tuple[int, int],
    density: float,
    keep_original: bool,
    activation_order: bool,
    seed: int,
) -> None:
    group_size, columns = shape
    W, H = random_weight(7, columns, seed), correlated_hessian(columns)
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(7, columns, generator=generator) < density

    result = compensate(
        W,
        H,
        kept,
        group_size,
        keep_original,
        activation_order=activation_order,
    )

    assert torch.equal(dequantize(result.pack(kept)), result.weight)
    assert not bool(result.clusters.codes[kept].any())
    if keep_original:
        assert torch.equal(result.weight[kept], W[kept])


@pytest.mark.parametrize("group_size", [-1, 96])
@pytest.mark.parametrize("activation_order", [True, False])
def test_better_than_the_nearest_codes(group_size: int, activation_order: bool) -> None:
    W, H = random_weight(48, 192), correlated_hessian(192)
    nearest = round_to_clusters(W, None, group_size, torch.bfloat16, CONFIG)

    result = compensate(W, H, group_size=group_size, activation_order=activation_order)

    assert relative_error(W, result.weight, H) < 0.8 * relative_error(
        W, nearest.weight, H
    )


def test_without_correlation_each_pair_takes_its_nearest_codes() -> None:
    W = random_weight(6, 96)
    config = CONFIG.model_copy(update={"grid_norm": 2.0})
    nearest = round_to_clusters(W, None, -1, torch.bfloat16, config)

    for H in (torch.eye(96), torch.zeros(96, 96)):
        result = compensate(W, H, refit_scales=False, grid_norm=2.0)

        assert torch.equal(result.scales, nearest.scales)
        assert torch.equal(result.clusters.codes, nearest.clusters.codes)


def test_scales_are_fitted_where_inputs_are_large_and_weights_are_not_kept() -> None:
    W, H = random_weight(12, 96), correlated_hessian(96)
    H[:40], H[:, :40] = 0.0, 0.0
    kept = random_mask(12, 96)
    W[kept] = 100.0
    diagonal = H.diagonal()

    result = compensate(W, H, kept, refit_scales=False)

    weights = diagonal + CONFIG.damp_percent * diagonal.mean()
    coded = W.masked_fill(kept, 0.0)
    expected = fit_scales(coded, weights, -1, torch.bfloat16, CONFIG)
    assert torch.equal(result.scales.float(), expected)


def test_the_strongest_inputs_are_rounded_first() -> None:
    """What is rounded first does not depend on the other weights."""
    W, H = random_weight(16, 192), correlated_hessian(192)
    H[96:] *= 10.0
    H[:, 96:] *= 10.0
    other = W.clone()
    other[:, :96] = random_weight(16, 96, seed=1)

    for activation_order in (True, False):
        codes, same = (
            compensate(
                weight, H, group_size=96, activation_order=activation_order
            ).clusters.codes[:, 96:]
            for weight in (W, other)
        )
        assert torch.equal(codes, same) == activation_order


@pytest.mark.parametrize("keeps", [False, True])
def test_a_pair_takes_the_index_that_costs_least(keeps: bool) -> None:
    """Every index tried by itself on a row of one pair, with errors moved along."""
    H = correlated_hessian(6)
    U, _ = inverse_factor(H, CONFIG.damp_percent)
    for seed in range(20):
        W = random_weight(1, 6, seed)
        # At places that differ from seed to seed.
        kept = W.abs() > 1.0 if keeps else torch.zeros_like(W, dtype=torch.bool)
        result = compensate(W, H, kept, refit_scales=False, activation_order=False)
        scale = float(result.scales)

        def cost(
            index: int, W: Tensor = W, kept: Tensor = kept, scale: float = scale
        ) -> tuple[float, list]:
            w, total, codes = W[0].clone(), 0.0, []
            for place in range(6):
                low, high = (-2, 1) if index == 0 else (-4, 3)
                if place % 3 == index - 1:
                    low = high = 0
                if kept[0, place]:
                    code, value = 0, W[0, place]
                else:
                    code = min(max(round(float(w[place] / scale)), low), high)
                    value = code * scale
                codes.append(code)
                error = (w[place] - value) / U[place, place]
                w[place + 1 :] -= error * U[place, place + 1 :]
                total += float(error**2)
            return total, codes

        costs = [cost(index) for index in range(4)]
        assert result.clusters.codes[0].tolist() == min(costs)[1]


def test_the_same_rows_alone_and_together() -> None:
    W, H = random_weight(30, 96), correlated_hessian(96)
    kept = random_mask(30, 96)

    together = compensate(W, H, kept)

    alone = [compensate(W[rows], H, kept[rows]) for rows in (slice(7), slice(7, 30))]
    codes = torch.cat([part.clusters.codes for part in alone])
    assert torch.equal(together.clusters.codes, codes)
    assert torch.equal(together.scales, torch.cat([part.scales for part in alone]))


def test_refitted_scales_are_better_and_keep_their_signs() -> None:
    W, H = random_weight(40, 192), correlated_hessian(192)
    kept = random_mask(40, 192)
    W[kept] *= 10.0

    plain, refitted = (
        compensate(W, H, kept, group_size=96, refit_scales=refit)
        for refit in (False, True)
    )

    assert torch.equal(plain.clusters.codes, refitted.clusters.codes)
    assert torch.equal(plain.scales.sign(), refitted.scales.sign())
    assert bool((plain.scales < 0).any())
    assert bool((plain.scales > 0).any())
    assert torch.equal(plain.weight[kept], refitted.weight[kept])
    assert_rows_improve(W, H, refitted.weight, plain.weight)


@pytest.mark.parametrize("block_size", [1, 96, 100, 192, 500])
def test_lazy_blocks_change_nothing(block_size: int) -> None:
    W, H = random_weight(9, 288), correlated_hessian(288)
    expected = compensate(W, H, block_size=96)

    result = compensate(W, H, block_size=block_size)

    changed = (result.clusters.codes != expected.clusters.codes).float().mean()
    assert float(changed) < 0.02


def test_what_float16_cannot_hold_is_refused() -> None:
    W, H = random_weight(4, 12), correlated_hessian(12)

    for kept in (None, W > 0):
        with pytest.raises(QuantizeError, match="not finite in torch"):
            compensate(W * 1e10, H, kept, dtype=torch.float16)
