from pathlib import Path

import pytest
import torch
from torch import Tensor

from tacq_vllm.quantize.errors import QuantizeError
from tacq_vllm.quantize.model import BaseModel, load_base_model
from tacq_vllm.quantize.progress import Progress
from tacq_vllm.quantize.saliency import (
    accumulate_gradients,
    gradient_power,
    needs_gradients,
    needs_quantized,
    saliency,
)
from tests.conftest import VOCAB_SIZE


@pytest.fixture(scope="module")
def windows() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(VOCAB_SIZE, (12,), generator=generator) for _ in range(4)]


def plain_gradients(
    base: BaseModel, windows: list[Tensor], power: int
) -> dict[str, Tensor]:
    """The same sums by the loss that Transformers itself computes."""
    weights = {name: linear.weight for name, linear in base.linears().items()}
    sums = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for weight in weights.values():
        weight.requires_grad_(True)
    for window in windows:
        tokens = window.unsqueeze(0)
        loss = base.model(tokens, labels=tokens).loss
        gradients = torch.autograd.grad(loss, list(weights.values()))
        for name, gradient in zip(weights, gradients, strict=True):
            sums[name] += gradient.abs() ** power
    for weight in weights.values():
        weight.requires_grad_(False)
    return sums


@pytest.mark.parametrize("power", [1, 2])
def test_gradients_are_summed_by_sample(
    tiny_base: BaseModel, windows: list[Tensor], power: int
) -> None:
    sums = accumulate_gradients(tiny_base, windows, power, Progress())

    expected = plain_gradients(tiny_base, windows, power)
    assert sums.keys() == expected.keys()
    for name, total in sums.items():
        assert bool(total.any())
        torch.testing.assert_close(total, expected[name], rtol=1e-4, atol=1e-8)


def test_the_model_is_as_before(tiny_base: BaseModel, windows: list[Tensor]) -> None:
    before = {name: t.clone() for name, t in tiny_base.model.state_dict().items()}

    with torch.no_grad():
        accumulate_gradients(tiny_base, windows, 1, Progress())

    for name, tensor in tiny_base.model.state_dict().items():
        assert torch.equal(tensor, before[name])
    for parameter in tiny_base.model.parameters():
        assert not parameter.requires_grad
        assert parameter.grad is None


def test_a_gradient_that_is_not_finite_is_refused(
    tiny_model: Path, windows: list[Tensor]
) -> None:
    base = load_base_model(str(tiny_model), torch.device("cpu"))
    base.linears()["model.layers.1.mlp.up_proj"].weight[0, 0] = float("nan")

    with pytest.raises(QuantizeError, match=r"layers\.\S+: a gradient is not finite"):
        accumulate_gradients(base, windows, 1, Progress())


def test_scores() -> None:
    W = torch.tensor([[-2.0, 0.5]])
    gradient = torch.tensor([[3.0, 4.0]])
    quantized = torch.tensor([[-1.75, 1.0]])

    scores = {
        metric: saliency(metric, W, gradient, quantized).tolist()[0]
        for metric in ("tacq", "qal", "msg", "grad", "fisher", "magnitude")
    }

    assert scores == {
        "tacq": [2.0 * 3.0 * 0.25, 0.5 * 4.0 * 0.5],
        "qal": [3.0 * 0.25, 4.0 * 0.5],
        "msg": [2.0 * 3.0, 0.5 * 4.0],
        "grad": [3.0, 4.0],
        "fisher": [3.0, 4.0],
        "magnitude": [2.0, 0.5],
    }


def test_what_scores_need() -> None:
    assert [m for m in ("tacq", "magnitude") if needs_gradients(m)] == ["tacq"]
    assert [m for m in ("tacq", "qal", "msg", "grad") if needs_quantized(m)] == [
        "tacq",
        "qal",
    ]
    assert gradient_power("fisher") == 2
    assert gradient_power("grad") == 1
