"""What the authors' published code gave on small layers; none of it is here.

`tests/data/published/*.json` were recorded outside of this project by running that
code, at the commit that each file names, on the layers of `seeded_layer`.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tacq_vllm.quantize.gptq import Hessian

_FOLDER = Path(__file__).parents[2] / "data" / "published"


@dataclass(frozen=True)
class Layer:
    """A linear, its inputs, and the squares of its gradients."""

    W: Tensor
    """float32 [out, in], with heavy tails."""
    x: Tensor
    """float32 [tokens, in], correlated, of very different sizes."""
    fisher: Tensor
    """float32 [out, in]."""

    @property
    def H(self) -> Tensor:
        """float32 [in, in]."""
        hessian = Hessian(self.W.shape[1], self.W.device)
        hessian.add(self.x)
        return hessian.mean()


def seeded_layer(
    out_features: int = 64, in_features: int = 128, tokens: int = 256, seed: int = 0
) -> Layer:
    """Make a layer that is the same on every machine and in every version."""
    random = np.random.RandomState(seed)
    W = 0.05 * random.standard_t(4, (out_features, in_features))
    directions = random.normal(size=(in_features // 4, in_features))
    x = random.normal(size=(tokens, in_features // 4)) @ directions
    x += random.normal(size=(tokens, in_features))
    x *= np.exp(random.normal(size=in_features))
    fisher = np.exp(2 * random.normal(size=(out_features, in_features)))
    return Layer(*(torch.from_numpy(a.astype(np.float32)) for a in (W, x, fisher)))


def published(name: str) -> dict[str, Any]:
    """What was recorded for a method."""
    content: dict[str, Any] = json.loads((_FOLDER / f"{name}.json").read_text())
    return content
