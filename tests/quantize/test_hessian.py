"""The Hessian of a linear's inputs, and the factor of its inverse."""

import pytest
import torch
from torch import Tensor

from tacq_vllm.quantize.errors import QuantizeError
from tacq_vllm.quantize.gptq import Hessian, inverse_factor


def correlated_hessian(in_features: int, seed: int = 0) -> Tensor:
    """The Hessian of inputs that live near a few directions."""
    generator = torch.Generator().manual_seed(seed + 1)
    directions = torch.randn(in_features // 4, in_features, generator=generator)
    mixture = torch.randn(400, in_features // 4, generator=generator)
    noise = torch.randn(400, in_features, generator=generator)
    hessian = Hessian(in_features, torch.device("cpu"))
    hessian.add(mixture @ directions + 0.3 * noise)
    return hessian.mean()


def test_hessian_is_the_mean_outer_product() -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(2, 5, 8, generator=generator) for _ in range(3)]
    hessian = Hessian(8, torch.device("cpu"))

    for batch in batches:
        hessian.add(batch.to(torch.bfloat16))

    x = torch.cat([b.bfloat16().double().reshape(-1, 8) for b in batches])
    torch.testing.assert_close(hessian.mean().double(), x.T @ x / 30)


def test_a_hessian_is_summed_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of columns and of tokens; neither a multiple of its block."""
    monkeypatch.setattr("tacq_vllm.quantize.gptq._HESSIAN_COLUMNS", 3)
    monkeypatch.setattr("tacq_vllm.quantize.gptq._HESSIAN_TOKENS", 4)
    x = torch.randn(10, 8, generator=torch.Generator().manual_seed(0))
    hessian = Hessian(8, torch.device("cpu"))

    hessian.add(x)

    torch.testing.assert_close(hessian.mean(), x.T @ x / 10)


def test_the_order_of_additions_to_a_hessian_is_no_matter() -> None:
    generator = torch.Generator().manual_seed(0)
    parts = list(torch.randn(40, 5, 16, generator=generator) * 100)
    forward, backward = (Hessian(16, torch.device("cpu")) for _ in range(2))

    for part, other in zip(parts, reversed(parts), strict=True):
        forward.add(part)
        backward.add(other)

    assert torch.equal(forward.mean(), backward.mean())


def test_inverse_factor() -> None:
    H = correlated_hessian(16)

    U, damp_percent = inverse_factor(H, 0.01)

    damped = H + 0.01 * H.diagonal().mean() * torch.eye(16)
    assert damp_percent == 0.01
    assert torch.equal(U, U.triu())
    torch.testing.assert_close(U.T @ U @ damped, torch.eye(16), rtol=0, atol=1e-3)


def test_inputs_that_are_always_zero_count_as_the_mean_of_the_others() -> None:
    H = correlated_hessian(16)
    H[:12], H[:, :12] = 0.0, 0.0

    U, _ = inverse_factor(H, 0.01)

    mean = H.diagonal()[12:].mean()
    damped = H + 0.01 * mean * torch.eye(16)
    damped.diagonal()[:12] += mean
    torch.testing.assert_close(U.T @ U @ damped, torch.eye(16), rtol=0, atol=1e-3)


def indefinite(off_diagonal: float) -> Tensor:
    """Eigenvalues 1 ± off_diagonal: rounding can leave such a Hessian."""
    return torch.tensor([[1.0, off_diagonal], [off_diagonal, 1.0]])


def test_damping_doubles_until_the_factorization_succeeds() -> None:
    _, damp_percent = inverse_factor(indefinite(1.05), 0.01)

    assert damp_percent == pytest.approx(0.08)


def test_damping_may_reach_the_whole_mean() -> None:
    _, damp_percent = inverse_factor(indefinite(1.9), 0.25)

    assert damp_percent == 1.0


def test_damping_doubles_where_the_inverse_cannot_be_factored() -> None:
    U, damp_percent = inverse_factor(torch.ones(2, 2), 2e-16)

    assert damp_percent > 2e-16
    assert bool(U.isfinite().all())


def test_a_hopeless_hessian_is_refused() -> None:
    with pytest.raises(QuantizeError, match="singular even when damped by 100%"):
        inverse_factor(indefinite(3.0), 0.01)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_hessian_that_is_not_finite_is_refused(value: float) -> None:
    H = torch.eye(4)
    H[1, 2] = value

    with pytest.raises(QuantizeError, match="not finite"):
        inverse_factor(H, 0.01)
