"""How much each weight matters for the calibration text (TaCQ paper, section 3)."""

from torch import Tensor

from tacq_vllm.config import SaliencyMetric


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
