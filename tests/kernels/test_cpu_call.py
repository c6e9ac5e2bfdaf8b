"""Memory for what the CPU kernels make of x."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch

from tests.builders import random_input, random_linear
from tests.kernels.cpu import OBSTACLE

if OBSTACLE is not None:
    pytest.skip(OBSTACLE, allow_module_level=True)

from tacq_vllm.kernels.cpu_call import _MOST_HELD, _memory
from tacq_vllm.kernels.cpu_linear import multiply


def test_a_thread_is_given_its_memory_again() -> None:
    first = _memory(5000)

    assert _memory(5000).data_ptr() == first.data_ptr()
    assert _memory(100).data_ptr() == first.data_ptr()
    assert _memory(first.numel() + 1).numel() > first.numel()


def test_no_other_thread_is_given_it() -> None:
    mine = _memory(5000)
    with ThreadPoolExecutor(1) as other:
        theirs = other.submit(_memory, 5000).result()

    assert theirs.data_ptr() != mine.data_ptr()


def test_large_memory_is_not_held() -> None:
    held = _memory(5000)

    assert _memory(_MOST_HELD + 1).numel() > _MOST_HELD
    assert _memory(5000).data_ptr() == held.data_ptr()


@pytest.mark.parametrize("tokens", [1, 20])
def test_threads_that_multiply_at_the_same_time(tokens: int) -> None:
    packed, _ = random_linear(3, 70, 576, 64, 0.02, torch.bfloat16, 1)
    inputs = [random_input(tokens, 576, dtype=torch.bfloat16) * n for n in (1, 2)]
    expected = [multiply(x, packed, None) for x in inputs]
    together = Barrier(len(inputs))

    def work(number: int) -> bool:
        together.wait()
        results = [multiply(inputs[number], packed, None) for _ in range(100)]
        return all(torch.equal(result, expected[number]) for result in results)

    with ThreadPoolExecutor(len(inputs)) as pool:
        assert all(pool.map(work, range(len(inputs))))
