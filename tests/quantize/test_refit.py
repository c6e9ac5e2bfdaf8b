import pytest
import torch
from torch import Tensor

from tacq_vllm.quantize.refit import refit_scales


def output_error(W: Tensor, weight: Tensor, H: Tensor) -> Tensor:
    """Squared output error of each row: [out]."""
    D = (W - weight).double()
    return ((D @ H.double()) * D).sum(1)


def random_hessian(size: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(200, size // 2, generator=generator)
    mixture = torch.randn(size // 2, size, generator=generator)
    noise = torch.randn(200, size, generator=generator)
    return (x @ mixture + noise).T @ (x @ mixture + noise) / 200


@pytest.fixture
def weight() -> Tensor:
    return torch.randn(24, 64, generator=torch.Generator().manual_seed(0))


def rounded(W: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Steps of a symmetric grid, and its scales, both poor on purpose."""
    scales = W.view(W.shape[0], groups, -1).abs().amax(2) / 2
    scales = scales.bfloat16().float()
    steps = (W / scales.repeat_interleave(64 // groups, dim=1)).round()
    return steps, scales


def dense(steps: Tensor, scales: Tensor) -> Tensor:
    return steps * scales.repeat_interleave(64 // scales.shape[1], dim=1)


@pytest.mark.parametrize("groups", [1, 4])
def test_no_row_gets_worse_and_most_get_better(weight: Tensor, groups: int) -> None:
    H = random_hessian(64)
    steps, scales = rounded(weight, groups)

    refitted = refit_scales(weight, H, steps, scales, torch.bfloat16)

    before = output_error(weight, dense(steps, scales), H)
    after = output_error(weight, dense(steps, refitted), H)
    assert bool((after <= before * (1 + 1e-4)).all())
    assert float((after < 0.99 * before).float().mean()) > 0.5
    assert torch.equal(refitted, refitted.bfloat16().float())
    assert bool((refitted > 0).all())


def test_the_scale_of_a_row_is_the_least_squares_one(weight: Tensor) -> None:
    steps, scales = rounded(weight, 1)

    refitted = refit_scales(weight, torch.eye(64), steps, scales, torch.float32)

    exact = (weight * steps).sum(1) / steps.square().sum(1)
    # The damping leaves a hundredth of the way.
    expected = scales[:, 0] + (exact - scales[:, 0]) / 1.01
    torch.testing.assert_close(refitted[:, 0], expected)


def test_the_scales_of_a_row_are_fitted_together(weight: Tensor) -> None:
    H = random_hessian(64)
    steps, scales = rounded(weight, 4)

    refitted = refit_scales(weight, H, steps, scales, torch.float32)

    for row in range(len(weight)):
        # [in, groups]: what each scale is multiplied with.
        S = torch.block_diag(*steps[row].view(4, 16, 1)).double()
        A = S.T @ H.double() @ S
        b = S.T @ H.double() @ (weight[row] - S @ scales[row].double())
        change = torch.linalg.solve(A + 0.01 * A.diagonal().diag(), b)
        expected = scales[row] + change.float()
        torch.testing.assert_close(refitted[row], expected, rtol=1e-3, atol=1e-5)


def test_what_rounding_would_make_worse_stays(weight: Tensor) -> None:
    H = random_hessian(64)
    steps, scales = rounded(weight, 4)
    for _ in range(3):
        before = output_error(weight, dense(steps, scales), H)

        scales = refit_scales(weight, H, steps, scales, torch.bfloat16)

        after = output_error(weight, dense(steps, scales), H)
        assert bool((after <= before * (1 + 1e-5)).all())


def test_scales_keep_their_signs(weight: Tensor) -> None:
    steps, scales = rounded(weight, 4)
    W = dense(steps, scales)
    W[:, :16] *= -1

    refitted = refit_scales(W, torch.eye(64), steps, scales, torch.bfloat16)

    assert torch.equal(refitted, scales)


def test_exact_weights_keep_their_scales(weight: Tensor) -> None:
    steps, scales = rounded(weight, 4)
    W = dense(steps, scales)

    refitted = refit_scales(W, random_hessian(64), steps, scales, torch.bfloat16)

    assert torch.equal(refitted, scales)


def test_groups_without_steps_keep_their_scales(weight: Tensor) -> None:
    steps, scales = rounded(weight, 4)
    steps[:, 16:32] = 0
    steps[3] = 0

    refitted = refit_scales(weight, random_hessian(64), steps, scales, torch.bfloat16)

    assert torch.equal(refitted[:, 1], scales[:, 1])
    assert torch.equal(refitted[3], scales[3])
    assert not torch.equal(refitted, scales)


def test_dead_inputs_do_no_harm(weight: Tensor) -> None:
    H = random_hessian(64)
    H[:, :16] = 0
    H[:16] = 0
    steps, scales = rounded(weight, 4)

    refitted = refit_scales(weight, H, steps, scales, torch.bfloat16)

    assert bool(refitted.isfinite().all())
    assert torch.equal(refitted[:, 0], scales[:, 0])


def test_rows_are_solved_in_parts_with_the_same_result(
    weight: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    H = random_hessian(64)
    steps, scales = rounded(weight, 4)
    whole = refit_scales(weight, H, steps, scales, torch.bfloat16)

    monkeypatch.setattr("tacq_vllm.quantize.refit._SYSTEM_VALUES", 5 * 16)
    parts = refit_scales(weight, H, steps, scales, torch.bfloat16)

    torch.testing.assert_close(parts, whole, rtol=1e-2, atol=0)
