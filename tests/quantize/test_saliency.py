import torch

from tacq_vllm.quantize.saliency import (
    gradient_power,
    needs_gradients,
    needs_quantized,
    saliency,
)


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
    metrics = ("tacq", "qal", "msg", "grad", "fisher", "magnitude")

    assert [m for m in metrics if needs_gradients(m)] == list(metrics[:-1])
    assert [m for m in metrics if needs_quantized(m)] == ["tacq", "qal"]
    assert {m: gradient_power(m) for m in metrics} == dict.fromkeys(metrics, 1) | {
        "fisher": 2
    }
