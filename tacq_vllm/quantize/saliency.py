"""How much each weight matters for the calibration text (TaCQ paper, section 3)."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tacq_vllm.config import SaliencyMetric
from tacq_vllm.quantize.errors import QuantizeError
from tacq_vllm.quantize.model import BaseModel
from tacq_vllm.quantize.progress import Progress


def accumulate_gradients(
    base: BaseModel, windows: Sequence[Tensor], power: int, progress: Progress
) -> dict[str, Tensor]:
    """Sum |∂L/∂W|**power over samples for every quantized linear.

    One backward pass a sample, L being the mean cross-entropy over all its tokens,
    in float32; the model's weights are unchanged afterwards.

    Returns:
        float32 [out, in] by linear.

    Raises:
        QuantizeError: a gradient is not finite.
    """
    linears = base.linears()
    sums = {name: torch.zeros_like(linear.weight) for name, linear in linears.items()}
    handles = []
    for name, linear in linears.items():
        linear.weight.requires_grad_(True)
        handles.append(
            linear.weight.register_post_accumulate_grad_hook(
                _accumulator(sums[name], power)
            )
        )
    try:
        with progress.phase("gradients", len(windows)) as bar, torch.enable_grad():
            for window in windows:
                tokens = window.to(base.model.device)
                logits = base.model(tokens.unsqueeze(0), use_cache=False).logits[0]
                loss = cross_entropy(logits[:-1].float(), tokens[1:])
                loss.backward()
                bar.advance(detail=f"loss {float(loss.detach()):.3f}")
    finally:
        for handle in handles:
            handle.remove()
        for linear in linears.values():
            linear.weight.requires_grad_(False)
    for name, total in sums.items():
        if not bool(total.isfinite().all()):
            raise QuantizeError(f"{name}: a gradient is not finite")
    return sums


def gradient_power(metric: SaliencyMetric) -> int:
    """Exponent under the sum over samples: squares for the Fisher diagonal."""
    return 2 if metric == "fisher" else 1


def saliency(
    metric: SaliencyMetric, W: Tensor, gradient: Tensor, quantized: Tensor
) -> Tensor:
    """Score of every weight (TaCQ paper, equations 5 to 7, and its ablations).

    Args:
        metric: which score.
        W: float32 [out, in].
        gradient: sum over samples of |∂L/∂W| (of its square for `fisher`).
        quantized: W as plain GPTQ quantizes it.
    """
    match metric:
        case "tacq":
            return W.abs() * gradient * (quantized - W).abs()
        case "qal":
            return gradient * (quantized - W).abs()
        case "msg":
            return W.abs() * gradient
        case "grad" | "fisher":
            return gradient
        case "magnitude":
            return W.abs()


def needs_gradients(metric: SaliencyMetric) -> bool:
    """Whether the score uses gradients."""
    return metric != "magnitude"


def needs_quantized(metric: SaliencyMetric) -> bool:
    """Whether the score uses the plainly quantized weights."""
    return metric in ("tacq", "qal")


def _accumulator(total: Tensor, power: int) -> Callable[[nn.Parameter], None]:
    def accumulate(weight: nn.Parameter) -> None:
        assert weight.grad is not None
        gradient = weight.grad.abs_()
        total.add_(gradient if power == 1 else gradient.pow_(power))
        weight.grad = None

    return accumulate
