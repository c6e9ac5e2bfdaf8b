from operator import itemgetter
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tacq_vllm.config import GptqConfig
from tacq_vllm.kernels.reference import dequantize
from tacq_vllm.quantize.gptq import quantize_matrix, relative_error
from tacq_vllm.quantize.grid import fit_grid
from tacq_vllm.quantize.result import GridResult
from tests.quantize.test_hessian import correlated_hessian, indefinite

CONFIG = GptqConfig(grid_steps=20)


def random_weight(out_features: int, in_features: int, seed: int = 0) -> Tensor:
    """Weights that bfloat16 holds exactly: float32 [out, in]."""
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(out_features, in_features, generator=generator).bfloat16().float()
    )


def random_mask(out_features: int, in_features: int, density: float = 0.05) -> Tensor:
    generator = torch.Generator().manual_seed(9)
    return torch.rand(out_features, in_features, generator=generator) < density


def quantize(
    W: Tensor,
    H: Tensor,
    kept: Tensor | None = None,
    *,
    bits: int = 3,
    group_size: int = 32,
    keep_original: bool = False,
    **config: Any,
) -> GridResult:
    return quantize_matrix(
        W,
        H,
        kept,
        bits=bits,
        group_size=group_size,
        dtype=torch.bfloat16,
        keep_original=keep_original,
        config=CONFIG.model_copy(update=config),
    )


def round_to_nearest(W: Tensor, bits: int, group_size: int) -> Tensor:
    parts = []
    for columns in W.split(group_size, dim=1):
        grid = fit_grid(columns, None, bits, torch.bfloat16, CONFIG)
        codes = (columns / grid.scales[:, None] + grid.zeros[:, None]).round()
        codes = codes.clamp(0, grid.max_code)
        parts.append((codes - grid.zeros[:, None]) * grid.scales[:, None])
    return torch.cat(parts, dim=1)


def nearest_codes(result: GridResult, W: Tensor, column: int) -> Tensor:
    """Codes next to the weights of a column in the first group: uint8 [out]."""
    scales = result.scales[:, 0].float()
    codes = (W[:, column] / scales).round() + result.zeros[:, 0]
    return codes.clamp(0, 7).to(torch.uint8)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("group_size", [32, 128])
@pytest.mark.parametrize("activation_order", [False, True])
def test_gptq_beats_round_to_nearest(
    bits: int, group_size: int, activation_order: bool
) -> None:
    W, H = random_weight(48, 128), correlated_hessian(128)

    result = quantize(
        W, H, bits=bits, group_size=group_size, activation_order=activation_order
    )

    nearest = round_to_nearest(W, bits, group_size)
    assert relative_error(W, result.weight, H) < 0.6 * relative_error(W, nearest, H)


def test_without_correlation_gptq_is_round_to_nearest() -> None:
    W = random_weight(20, 64)

    result = quantize(W, torch.eye(64), refit_scales=False)

    assert torch.equal(result.weight, round_to_nearest(W, 3, 32))


def assert_rows_improve(W: Tensor, H: Tensor, new: Tensor, old: Tensor) -> None:
    """No row's output error has grown, and that of many has become smaller."""
    errors = [
        tuple(relative_error(row[None], weight[None], H) for weight in weights)
        for row, *weights in zip(W, new, old, strict=True)
    ]
    assert all(new <= old * (1 + 1e-4) for new, old in errors)
    assert sum(new < 0.99 * old for new, old in errors) > 20


def test_relative_error() -> None:
    W, quantized = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 1.0]])
    H = torch.tensor([[1.0, 0.5], [0.5, 2.0]])

    assert relative_error(W, quantized, H) == pytest.approx(2.0 / 11.0)
    assert relative_error(W, W, H) == 0.0
    assert relative_error(W * 0, quantized, H) == 0.0


@given(
    bits=st.sampled_from([2, 3, 4]),
    group_size=st.sampled_from([-1, 16, 32]),
    block_size=st.integers(1, 100),
    density=st.sampled_from([0.0, 0.05, 0.5]),
    keep_original=st.booleans(),
    activation_order=st.booleans(),
    refit_scales=st.booleans(),
)
def test_the_packed_linear_is_the_weight_of_the_result(
    bits: int,
    group_size: int,
    block_size: int,
    density: float,
    keep_original: bool,
    activation_order: bool,
    refit_scales: bool,
) -> None:
    W, H = random_weight(10, 96), correlated_hessian(96)
    kept = random_mask(10, 96, density)

    result = quantize(
        W,
        H,
        kept,
        bits=bits,
        group_size=group_size,
        block_size=block_size,
        keep_original=keep_original,
        activation_order=activation_order,
        refit_scales=refit_scales,
        grid_steps=3,
    )

    assert torch.equal(dequantize(result.pack(kept)), result.weight)


@pytest.mark.parametrize("keep_original", [False, True])
def test_codes_of_kept_weights_stand_for_zero(keep_original: bool) -> None:
    W, H = random_weight(24, 64), correlated_hessian(64)
    kept = random_mask(24, 64)

    result = quantize(W, H, kept, keep_original=keep_original)

    zeros = result.zeros.repeat_interleave(32, dim=1)
    assert torch.equal(result.codes[kept], zeros[kept])


def test_original_kept_weights_are_exact() -> None:
    W, H = random_weight(24, 64), correlated_hessian(64)
    kept = random_mask(24, 64)

    result = quantize(W, H, kept, keep_original=True)

    assert torch.equal(result.weight[kept], W[kept])
    assert torch.equal(dequantize(result.pack(kept))[kept], W[kept])


def test_compensated_kept_weights_absorb_error() -> None:
    W, H = random_weight(24, 64), correlated_hessian(64)
    kept = random_mask(24, 64)

    compensated = quantize(W, H, kept)
    original = quantize(W, H, kept, keep_original=True)

    assert not torch.equal(compensated.weight[kept], W[kept])
    assert relative_error(W, compensated.weight, H) < relative_error(
        W, original.weight, H
    )


def test_keeping_weights_lowers_the_error() -> None:
    W, H = random_weight(24, 64), correlated_hessian(64)
    W[torch.arange(24), torch.arange(24)] = 20.0

    plain = quantize(W, H, group_size=-1)
    kept = quantize(W, H, W == 20.0, group_size=-1)

    error = relative_error(W, plain.weight, H)
    assert relative_error(W, kept.weight, H) < 0.3 * error


def test_stacked_rows_do_not_see_each_other() -> None:
    W, H = random_weight(30, 64), correlated_hessian(64)
    kept = random_mask(30, 64)

    together = quantize(W, H, kept)

    alone = [quantize(W[rows], H, kept[rows]) for rows in (slice(0, 7), slice(7, 30))]
    assert torch.equal(together.codes, torch.cat([part.codes for part in alone]))
    assert torch.equal(together.scales, torch.cat([part.scales for part in alone]))


def test_rows_of_a_result() -> None:
    W, H = random_weight(30, 64), correlated_hessian(64)
    kept = random_mask(30, 64)
    result = quantize(W, H, kept)

    part = result.map_rows(itemgetter(slice(7, 30)))

    packed = part.pack(kept[7:])
    assert torch.equal(dequantize(packed), result.weight[7:])
    assert part.damp_percent == result.damp_percent


@pytest.mark.parametrize("keep_original", [False, True])
def test_scales_are_fitted_to_the_codes_that_are_there(keep_original: bool) -> None:
    W, H = random_weight(40, 96), correlated_hessian(96)
    kept = random_mask(40, 96)

    refitted, plain = (
        quantize(W, H, kept, keep_original=keep_original, refit_scales=refit)
        for refit in (True, False)
    )

    assert torch.equal(refitted.codes, plain.codes)
    assert torch.equal(refitted.zeros, plain.zeros)
    assert torch.equal(refitted.weight[kept], plain.weight[kept])
    assert not torch.equal(refitted.scales, plain.scales)
    assert_rows_improve(W, H, refitted.weight, plain.weight)


@pytest.mark.parametrize("group_size", [-1, 16, 32, 48, 96])
@pytest.mark.parametrize("block_size", [1, 7, 32, 50, 64, 80])
@pytest.mark.parametrize("activation_order", [False, True])
def test_block_size_is_only_about_speed(
    group_size: int, block_size: int, activation_order: bool
) -> None:
    W, H = random_weight(40, 96), correlated_hessian(96)
    kept = random_mask(40, 96)

    result, whole = (
        quantize(
            W,
            H,
            kept,
            group_size=group_size,
            block_size=size,
            activation_order=activation_order,
        )
        for size in (block_size, 96)
    )

    # A sum in another order may move a value across the middle of two codes.
    assert float((result.codes == whole.codes).float().mean()) > 0.97
    assert relative_error(W, result.weight, H) == pytest.approx(
        relative_error(W, whole.weight, H), rel=0.02
    )


def test_the_strongest_inputs_are_rounded_first() -> None:
    # Only the first column to be rounded has not taken up another's error.
    W, H = random_weight(16, 32), correlated_hessian(32)
    H[20] *= 10.0
    H[:, 20] *= 10.0

    for activation_order, first, later in ((True, 20, 0), (False, 0, 20)):
        result = quantize(W, H, activation_order=activation_order, refit_scales=False)
        assert torch.equal(result.codes[:, first], nearest_codes(result, W, first))
        assert not torch.equal(result.codes[:, later], nearest_codes(result, W, later))


def test_an_input_that_is_always_zero_is_rounded_to_nearest() -> None:
    W, H = random_weight(16, 64), correlated_hessian(64)
    H[5], H[:, 5] = 0.0, 0.0

    result = quantize(W, H)

    assert result.damp_percent == CONFIG.damp_percent
    assert bool(result.weight.isfinite().all())
    assert torch.equal(result.codes[:, 5], nearest_codes(result, W, 5))


def test_beside_such_an_input_the_scale_of_the_others_is_no_matter() -> None:
    W, H = random_weight(16, 64), correlated_hessian(64)
    H[5], H[:, 5] = 0.0, 0.0

    result, small = quantize(W, H), quantize(W, H * 2.0**-14)

    assert torch.equal(result.codes, small.codes)
    assert not torch.equal(result.weight, round_to_nearest(W, 3, 32))


def test_without_any_input_weights_are_rounded_to_nearest() -> None:
    W = random_weight(16, 64)

    result = quantize(W, torch.zeros(64, 64))

    assert torch.equal(result.weight, round_to_nearest(W, 3, 32))


def test_damping_that_was_needed_is_reported() -> None:
    H = torch.eye(16)
    H[:2, :2] = indefinite(1.05)

    result = quantize(random_weight(4, 16), H, group_size=16)

    assert result.damp_percent == pytest.approx(0.08)


def test_the_weight_is_left_alone() -> None:
    W, H = random_weight(8, 32), correlated_hessian(32)
    before = W.clone(), H.clone()

    quantize(W, H, random_mask(8, 32))

    assert torch.equal(W, before[0])
    assert torch.equal(H, before[1])
