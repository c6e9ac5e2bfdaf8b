"""What a model predicts, against the text and against the 16-bit model.

Logits of all tokens at once would be the largest tensor of the run. The losses of some
tokens are computed, and what they say about the states, before the next ones.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy, kl_div, log_softmax

Head = Callable[[Tensor], Tensor]
"""From states [n, hidden] to logits, float32 [n, vocabulary]."""

_CHUNK_LOGITS = 1 << 23
"""Logits that are in memory at a time: 32 MiB, a few times over."""


class Losses(NamedTuple):
    """Sums over tokens."""

    total: Tensor
    """What is trained on: has a gradient."""
    text: Tensor
    """Cross-entropy of the text alone."""


def predict_losses(
    states: Tensor,
    targets: Tensor,
    teacher: Tensor | None,
    head: Head,
    distill: float,
    temperature: float,
) -> Losses:
    """Sum the losses of n tokens.

    total = (1 - distill) · cross-entropy
    + distill · temperature² · KL(16-bit model ‖ model), both at the temperature.

    Args:
        states: [n, hidden], what the head is given.
        targets: int64 [n].
        teacher: the 16-bit model's states [n, hidden]; None: no divergence.
        head: the same for both.
        distill: share of the divergence.
        temperature: of both models' predictions in the divergence.
    """
    distill = distill if teacher is not None else 0.0
    total, text = _Losses.apply(states, targets, teacher, head, distill, temperature)  # type: ignore[no-untyped-call]
    return Losses(total, text)


class _Losses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        targets: Tensor,
        teacher: Tensor | None,
        head: Head,
        distill: float,
        temperature: float,
    ) -> tuple[Tensor, Tensor]:
        wanted = ctx.needs_input_grad[0]
        grads: list[Tensor] = []
        total = states.new_zeros((), dtype=torch.float32)
        text = torch.zeros_like(total)
        for start, stop in _chunks(states, head):
            part = states[start:stop].detach().requires_grad_(wanted)
            with torch.set_grad_enabled(wanted):
                logits = head(part)
                loss = cross_entropy(logits, targets[start:stop], reduction="sum")
                text += loss.detach()
                if teacher is not None and distill > 0:
                    divergence = _divergence(
                        logits, _no_grad(head, teacher[start:stop]), temperature
                    )
                    loss = (1 - distill) * loss + distill * divergence
            total += loss.detach()
            if wanted:
                grads.extend(torch.autograd.grad(loss, part))
        if wanted:
            ctx.save_for_backward(torch.cat(grads))
        ctx.mark_non_differentiable(text)
        return total, text

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Any, ...]:
        (states_grad,) = ctx.saved_tensors
        return states_grad * grad, None, None, None, None, None


def _chunks(states: Tensor, head: Head) -> list[tuple[int, int]]:
    count = states.shape[0]
    vocabulary = _no_grad(head, states[:1]).shape[-1]
    size = max(1, _CHUNK_LOGITS // vocabulary)
    return [(start, min(start + size, count)) for start in range(0, count, size)]


@torch.no_grad()
def _no_grad(head: Head, states: Tensor) -> Tensor:
    return head(states)


def _divergence(logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    divergence = kl_div(
        log_softmax(logits / temperature, -1),
        log_softmax(teacher / temperature, -1),
        log_target=True,
        reduction="sum",
    )
    return divergence * temperature**2
