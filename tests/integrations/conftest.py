"""Checkpoints: of tiny models of several families, and the one of the demo."""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import (
    Gemma3TextConfig,
    Glm4Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from tacq_vllm.config import Recipe
from tests.conftest import SIZES, open_model, quick, run_pipeline, save_random
from tests.integrations.asking import Worker, vllm_worker

# vLLM's attention on a CPU takes heads of 32 columns, not of 16.
HEADS: dict[str, Any] = SIZES | {"head_dim": 32, "pad_token_id": 0}
# Families whose heads are the hidden size cut in pieces.
PIECES: dict[str, Any] = SIZES | {"hidden_size": 128, "pad_token_id": 0}
FAMILIES: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**HEADS),
    "mistral": MistralConfig(**HEADS, sliding_window=8),
    "qwen2": Qwen2Config(**PIECES),
    "qwen3": Qwen3Config(**HEADS),
    "gemma3": Gemma3TextConfig(
        **HEADS,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
        # Tied to scaled embeddings a random model says one token over and over.
        tie_word_embeddings=False,
    ),
    "phi3": Phi3Config(**PIECES),
    "glm4": Glm4Config(**HEADS),
    "mixtral": MixtralConfig(**HEADS, num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": Qwen3MoeConfig(
        **HEADS, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64
    ),
}

DEMO = Path(__file__).parents[2] / "build/demo/SmolLM2-135M-Instruct-TaCQ-w3"

FamilyCheckpoint = Callable[..., Path]


@pytest.fixture(scope="session")
def family_checkpoint(
    tiny_recipe: Recipe, tmp_path_factory: pytest.TempPathFactory
) -> FamilyCheckpoint:
    """Quantize a model of a family; gives its folder, which tests leave as it is.

    Further arguments change fields of the recipe.
    """

    @functools.cache
    def make(family: str, **fields: Any) -> Path:
        folder = tmp_path_factory.mktemp(family)
        model = save_random(FAMILIES[family], folder / "model")
        base = open_model(model, folder / "work")
        output = folder / f"{family}-{'FineQ' if fields else 'TaCQ-w3'}"
        run_pipeline(base, quick(tiny_recipe, **fields), output, folder / "work")
        return output

    return make


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2, quantized by the demo."""
    if not (DEMO / "config.json").is_file():
        pytest.skip(f"{DEMO} is not there: `make test` and `make demo` make it")
    return DEMO


@pytest.fixture(scope="module")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    """Ask vLLM for the greedy tokens that follow the prompts."""
    with vllm_worker(tmp_path_factory.mktemp("vllm")) as serve:
        yield serve


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """vLLM's linears can be made, and models loaded, outside of an engine."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed.parallel_state import (
        cleanup_dist_env_and_memory,
        init_distributed_environment,
        initialize_model_parallel,
    )
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    rendezvous = tmp_path_factory.mktemp("rendezvous") / "store"
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, f"file://{rendezvous}", 0, backend="gloo")
        initialize_model_parallel(1, 1)
        yield
    cleanup_dist_env_and_memory()
