"""The line that a server logs when a checkpoint's weights are there."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed")

from tacq_vllm.integrations.vllm import summary
from tacq_vllm.integrations.vllm.summary import LoadSummary
from tacq_vllm.kernels.ops import kernel_name
from tests.integrations.vllm_linears import stored_linears

pytestmark = pytest.mark.vllm


@pytest.mark.parametrize("has_experts", [False, True])
def test_once_with_the_last_linear(
    monkeypatch: pytest.MonkeyPatch, has_experts: bool
) -> None:
    lines: list[str] = []
    monkeypatch.setattr(
        summary.logger, "info_once", lambda text, *rest, **_: lines.append(text % rest)
    )
    shapes = {"gate_proj": (1024, 512), "up_proj": (1024, 512)}
    config, packed, _ = stored_linears(shapes, 3, 32)
    loaded = LoadSummary(config.schema)
    loaded.name("org/x")
    loaded.has_experts = has_experts
    for _ in packed:
        loaded.expect_linear()

    loaded.add_linear(packed["gate_proj"], torch.float32)
    assert lines == []
    loaded.add_linear(packed["up_proj"], torch.float32)
    # Again, when other weights come.
    loaded.add_linear(packed["up_proj"], torch.float32)

    (line,) = lines
    tensors = [t for linear in packed.values() for t in linear.tensors().values()]
    nbytes = sum(tensor.nbytes for tensor in tensors)
    assert line == (
        f"tacq: org/x: 3 bits, group 32, {100 * config.schema.outlier_ratio:.2f} % "
        f"kept, {8 * nbytes / 2**20:.2f} effective bits, kernel "
        f"{kernel_name(packed['up_proj'], torch.float32)}, {nbytes / 1e6:.1f} MB of "
        f"weights{', experts not quantized' if has_experts else ''}"
    )


def test_a_folder_is_called_by_its_own_name(tmp_path: Path) -> None:
    config, _, _ = stored_linears({"up_proj": (64, 64)}, 3, 32)
    loaded = LoadSummary(config.schema)

    loaded.name(str(tmp_path))

    assert loaded.checkpoint == tmp_path.name
