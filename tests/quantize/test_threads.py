"""The number of threads changes next to nothing: GPTQ would blow up a difference.

With AVX-512 everything is equal here; other matrix products differ in a few last bits.
"""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tacq_vllm.config import GptqConfig
from tacq_vllm.quantize.gptq import (
    Hessian,
    inverse_factor,
    quantize_matrix,
)
from tacq_vllm.quantize.result import GridResult

IN_FEATURES = 576
TOKENS = 2048
"""Of so many tokens PyTorch gives some to each thread, and adds up their sums."""


@pytest.fixture
def threads() -> Iterator[None]:
    """Tests may change the number of threads."""
    number = torch.get_num_threads()
    yield
    torch.set_num_threads(number)


def measure(threads: int) -> tuple[Tensor, Tensor]:
    """A Hessian, and its factor."""
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(IN_FEATURES, IN_FEATURES, generator=generator)
    hessian = Hessian(IN_FEATURES, mixing.device)
    hessian.add(torch.randn(TOKENS, IN_FEATURES, generator=generator) @ mixing)
    H = hessian.mean()
    return H, inverse_factor(H, 0.01)[0]


def quantize(threads: int, H: Tensor) -> GridResult:
    torch.set_num_threads(threads)
    W = torch.randn(256, IN_FEATURES, generator=torch.Generator().manual_seed(1))
    return quantize_matrix(
        W,
        H,
        W.abs() > 3,
        bits=3,
        group_size=64,
        dtype=torch.bfloat16,
        keep_original=True,
        config=GptqConfig(),
    )


def equal_share(a: Tensor, b: Tensor) -> float:
    return float((a == b).double().mean())


@pytest.mark.usefixtures("threads")
def test_two_threads_give_the_codes_of_one() -> None:
    (H, U), (other_H, other_U) = measure(1), measure(2)
    assert equal_share(H, other_H) > 0.99
    torch.testing.assert_close(other_U, U, rtol=1e-5, atol=1e-7)

    alone, together = quantize(1, H), quantize(2, H)
    assert equal_share(together.codes, alone.codes) > 0.9999
    assert equal_share(together.scales, alone.scales) > 0.999
