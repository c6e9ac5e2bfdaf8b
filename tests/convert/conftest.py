import pytest

from tacq_vllm.kernels import ops


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile nothing for models that are loaded to be dequantized."""
    monkeypatch.setattr(ops, "_kernels", lambda device_type: None)
