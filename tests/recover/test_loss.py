"""Losses of many tokens, a chunk at a time."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, softmax

from tacq_vllm.recover import loss as losses_module
from tacq_vllm.recover.loss import predict_losses

TOKENS, HIDDEN, VOCABULARY = 11, 6, 20
TEMPERATURE = 1.7


@pytest.fixture(params=[1, 4, 1000])
def chunk(request, monkeypatch) -> None:
    """Chunks of one token, of some, and one of all."""
    monkeypatch.setattr(losses_module, "_CHUNK_LOGITS", request.param * VOCABULARY)


@pytest.fixture
def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """States, targets, the teacher's states, the head's weight."""
    generator = torch.Generator().manual_seed(0)
    states, teacher = (
        torch.randn(TOKENS, HIDDEN, generator=generator) for _ in range(2)
    )
    targets = torch.randint(VOCABULARY, (TOKENS,), generator=generator)
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator)
    return states.requires_grad_(), targets, teacher, weight


def divergence(logits: Tensor, teacher: Tensor) -> Tensor:
    p, q = softmax(teacher / TEMPERATURE, -1), softmax(logits / TEMPERATURE, -1)
    return TEMPERATURE**2 * (p * (p.log() - q.log())).sum()


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("distill", [0.0, 0.3, 1.0])
def test_losses_and_gradients_are_those_of_all_logits(inputs, distill):
    states, targets, teacher, weight = inputs

    found = predict_losses(
        states, targets, teacher, lambda x: x @ weight.T, distill, TEMPERATURE
    )
    (gradient,) = torch.autograd.grad(3 * found.total, states)

    logits = states @ weight.T
    text = cross_entropy(logits, targets, reduction="sum")
    total = (1 - distill) * text + distill * divergence(logits, teacher @ weight.T)
    torch.testing.assert_close(found.text, text)
    torch.testing.assert_close(found.total, total)
    (expected,) = torch.autograd.grad(3 * total, states)
    torch.testing.assert_close(gradient, expected)


def test_without_a_teacher_there_is_the_text_alone(inputs):
    states, targets, _, weight = inputs

    found = predict_losses(states, targets, None, lambda x: x @ weight.T, 0.5, 1.0)

    assert torch.equal(found.total, found.text)


def test_a_model_that_predicts_as_the_teacher_does_not_diverge(inputs):
    states, targets, _, weight = inputs

    found = predict_losses(
        states, targets, states.detach(), lambda x: x @ weight.T, 1.0, 2.0
    )

    assert float(found.total.detach()) == pytest.approx(0.0, abs=1e-4)


def test_nothing_is_kept_where_no_gradient_is_asked_for(inputs):
    states, targets, _, weight = inputs

    with torch.no_grad():
        found = predict_losses(states, targets, None, lambda x: x @ weight.T, 0.0, 1.0)

    assert not found.total.requires_grad
