from collections.abc import Iterator

import pytest
import torch

from tests.interpreter import interpreted


@pytest.fixture(scope="module")
def interpreter() -> Iterator[None]:
    """Run Triton's kernels in its interpreter where there is no GPU."""
    with interpreted():
        yield


@pytest.fixture
def restore_threads() -> Iterator[None]:
    """Leave PyTorch as many threads as it had."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
