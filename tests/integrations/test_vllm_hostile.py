"""Each kind of broken checkpoint in vLLM, all in this process.

The configuration is made as the server makes it, and the model loaded as its worker
does; no engine is started.
"""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from tacq_vllm.format.validation import find_faults
from tests.hostile.good import CLUSTERED, GOOD
from tests.hostile.kind import HOSTS_OWN, Kind, own_words
from tests.hostile.kinds import KINDS

pytest.importorskip("vllm", reason="vLLM is not installed")

import torch
from vllm.config import (
    DeviceConfig,
    LoadConfig,
    ModelConfig,
    VllmConfig,
    set_current_vllm_config,
)
from vllm.model_executor.model_loader import get_model

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("one_process")]


class Lines(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@pytest.fixture
def log() -> Iterator[list[str]]:
    """What vLLM's loggers say, the plugin's among them."""
    handler = Lines()
    logger = logging.getLogger("vllm")
    logger.addHandler(handler)
    yield handler.lines
    logger.removeHandler(handler)


def load(
    folder: Path, monkeypatch: pytest.MonkeyPatch, quantization: str | None = None
) -> torch.nn.Module:
    """As a server and its worker on the CPU do."""
    # The worker has no accelerator whose cache could be emptied either.
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)
    model = ModelConfig(
        model=str(folder),
        dtype="float32",
        max_model_len=64,
        enforce_eager=True,
        quantization=quantization,
    )
    config = VllmConfig(
        model_config=model, load_config=LoadConfig(), device_config=DeviceConfig("cpu")
    )
    with set_current_vllm_config(config):
        return get_model(vllm_config=config)


@pytest.mark.parametrize("folder", [GOOD, CLUSTERED], ids=["planes", "clusters"])
def test_the_good_checkpoint_is_loaded(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(folder, monkeypatch)


def test_the_flag_on_a_model_that_is_not_quantized(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"tacq: .*config.json has no quantization_"):
        load(tiny_model, monkeypatch, "tacq")


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_the_line_is_that_of_verify(
    kind: Kind,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    log: list[str],
) -> None:
    folder = kind.make(tmp_path / "broken")

    with pytest.raises(HOSTS_OWN):
        load(folder, monkeypatch)

    if "vllm" not in kind.host_first:
        (line,) = (line for line in log if line.startswith("tacq: "))
        assert own_words(line) == own_words(f"tacq: {find_faults(folder)[0]}")
