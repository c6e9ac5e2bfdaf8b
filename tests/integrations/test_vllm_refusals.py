"""What vLLM can be asked for and a TaCQ checkpoint cannot do: one line, at once."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed")

from vllm.config import ParallelConfig, get_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers import linear as vllm_linear
from vllm.model_executor.layers.quantization import base_config

from tacq_vllm.integrations.vllm import parallel
from tests.integrations.vllm_linears import stored_linears

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("one_process")]


def configure(checkpoint: Path, **options: Any) -> None:
    """Make the configuration as the server does, before a worker starts."""
    EngineArgs(
        str(checkpoint), dtype="float32", max_model_len=64, **options
    ).create_engine_config()


@pytest.mark.parametrize(
    "load_format", ["sharded_state", "runai_streamer_sharded", "tensorizer"]
)
def test_load_formats_of_weights_that_vllm_has_saved(
    tiny_checkpoint: Path, load_format: str
) -> None:
    with pytest.raises(ValueError, match=f"tacq: --load-format {load_format} is not"):
        configure(tiny_checkpoint, load_format=load_format)


def test_batch_invariance(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    with pytest.raises(ValueError, match="tacq: VLLM_BATCH_INVARIANT is not supported"):
        configure(tiny_checkpoint)


def test_elastic_expert_parallelism(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which vLLM has on GPUs alone."""
    making = SimpleNamespace(parallel_config=ParallelConfig())
    monkeypatch.setattr(parallel, "config_in_the_making", lambda: making)
    config, _, _ = stored_linears({"down_proj": (64, 128)}, 3, 32)
    parallel.check_ranks(config.schema)

    making.parallel_config.enable_elastic_ep = True
    with pytest.raises(ValueError, match="tacq: --enable-elastic-ep is not supported"):
        parallel.check_ranks(config.schema)


@pytest.mark.skipif(
    not hasattr(base_config, "resolve_quant_method"),
    reason="this vLLM quantizes no linears that a checkpoint has quantized",
)
def test_quantizing_quantized_linears_once_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from vllm.config.quantization import resolve_quantization_config
    from vllm.model_executor.layers.quantization.online.base import (
        OnlineQuantizationConfig,
    )

    # Without a model there is none, and what quantizes asks it for its type.
    model = SimpleNamespace(dtype=torch.bfloat16)
    monkeypatch.setattr(get_current_vllm_config(), "model_config", model)
    config, _, _ = stored_linears({"down_proj": (64, 128)}, 3, 32)
    online = resolve_quantization_config("fp8_per_tensor", None)
    config.online_quantization_config = OnlineQuantizationConfig(online)

    with pytest.raises(ValueError, match="tacq: down_proj: is quantized, and --quant"):
        vllm_linear.RowParallelLinear(
            128, 64, bias=False, quant_config=config, prefix="down_proj"
        )
