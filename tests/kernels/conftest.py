from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def restore_threads() -> Iterator[None]:
    """Leave PyTorch as many threads as it had."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
