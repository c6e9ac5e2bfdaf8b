"""What users of vLLM rely on, with a TaCQ checkpoint: the table in docs/vllm.md."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import normalize
from transformers import AutoModelForCausalLM, Glm4MoeConfig

pytest.importorskip("vllm", reason="vLLM is not installed")

import tacq_vllm.integrations.transformers  # noqa: F401
from tacq_vllm.config import Recipe
from tests.conftest import open_model, quick, run_pipeline, save_random
from tests.integrations.asking import (
    Worker,
    adapted_tokens,
    make_prompts,
    transformers_tokens,
)
from tests.integrations.conftest import FAMILIES, HEADS, FamilyCheckpoint
from tests.integrations.heads import add_mtp_layer, save_eagle
from tests.integrations.vllm_worker import NEW_TOKENS

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

LOOKUP = {"method": "ngram", "prompt_lookup_min": 1, "prompt_lookup_max": 2}
SAME_TOKENS: dict[str, dict[str, Any]] = {
    "prefix caching": {"enable_prefix_caching": True, "block_size": 32},
    "chunked prefill": {"enable_chunked_prefill": True, "max_num_batched_tokens": 16},
    "asynchronous scheduling": {"async_scheduling": True},
    "n-gram speculation": {
        "speculative_config": LOOKUP | {"num_speculative_tokens": 3}
    },
}
AT_WORK = {
    "prefix caching": "prefix_cache_hits",
    "n-gram speculation": "spec_decode_num_accepted_tokens",
}
"""What vLLM counts where a feature does something."""

WITH_MTP = Glm4MoeConfig(
    **HEADS, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=64
)

ON_A_GPU: dict[str, dict[str, Any]] = {
    "compilation and CUDA graphs": {"enforce_eager": False},
    "CPU offload": {"cpu_offload_gb": 1},
}
HAS_GPU = torch.cuda.is_available()
needs_gpu = pytest.mark.skipif(not HAS_GPU, reason="needs an NVIDIA GPU")
needs_cpu = pytest.mark.skipif(HAS_GPU, reason="is about vLLM on a CPU")
HAS_FP8_CACHE = HAS_GPU or torch.cpu._is_avx512_supported()


@pytest.fixture(scope="module")
def checkpoint(family_checkpoint: FamilyCheckpoint) -> Path:
    return family_checkpoint("llama")


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> list[list[int]]:
    return transformers_tokens(checkpoint)


@pytest.mark.parametrize("feature", SAME_TOKENS)
def test_the_same_tokens(
    serve: Worker, checkpoint: Path, expected: list[list[int]], feature: str
) -> None:
    options = SAME_TOKENS[feature] | {"max_num_seqs": 8}
    twice = make_prompts() * 2

    answer = serve.ask("generate", checkpoint, options, prompts=twice)

    assert answer.tokens == expected * 2
    if feature in AT_WORK:
        assert answer.count(AT_WORK[feature]) > 0


def test_a_tacq_model_drafts(
    serve: Worker, checkpoint: Path, expected: list[list[int]]
) -> None:
    draft = {"method": "draft_model", "num_speculative_tokens": 2}

    answer = serve(checkpoint, speculative_config=draft | {"model": str(checkpoint)})

    assert answer.tokens == expected
    # It is the model that it drafts for, which so takes all that it says.
    drafted = answer.count("spec_decode_num_draft_tokens")
    assert answer.count("spec_decode_num_accepted_tokens") == drafted > 0


def test_a_16_bit_model_drafts(
    serve: Worker, checkpoint: Path, expected: list[list[int]], tmp_path: Path
) -> None:
    model = save_random(FAMILIES["llama"], tmp_path / "model")
    draft = {"method": "draft_model", "num_speculative_tokens": 2, "model": str(model)}

    answer = serve(checkpoint, speculative_config=draft)

    assert answer.tokens == expected
    drafted = answer.count("spec_decode_num_draft_tokens")
    assert 0 < answer.count("spec_decode_num_accepted_tokens") < drafted


@pytest.mark.parametrize("method", ["eagle", "eagle3"])
def test_a_head_drafts(
    serve: Worker,
    checkpoint: Path,
    expected: list[list[int]],
    tmp_path: Path,
    method: str,
) -> None:
    head = save_eagle(method, tmp_path)
    draft = {"method": method, "num_speculative_tokens": 2, "model": str(head)}

    answer = serve(checkpoint, speculative_config=draft)

    assert answer.tokens == expected
    assert answer.count("spec_decode_num_draft_tokens") > 0


def test_a_layer_of_the_model_drafts(
    serve: Worker, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    model = save_random(WITH_MTP, tmp_path / "model")
    add_mtp_layer(model)
    base = open_model(model, tmp_path / "work")
    checkpoint = tmp_path / "checkpoint"
    run_pipeline(base, quick(tiny_recipe), checkpoint, tmp_path / "work")
    draft = {"method": "mtp", "num_speculative_tokens": 1}

    answer = serve(checkpoint, speculative_config=draft)

    assert answer.tokens == transformers_tokens(checkpoint)
    assert answer.count("spec_decode_num_draft_tokens") > 0


def test_dummy_weights(serve: Worker, checkpoint: Path) -> None:
    tokens = serve(checkpoint, load_format="dummy").tokens

    assert {len(new) for new in tokens} == {NEW_TOKENS}


def test_embeddings(serve: Worker, checkpoint: Path) -> None:
    vectors = serve.ask("embed", checkpoint, {}).tokens

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    for prompt, vector in zip(make_prompts(), vectors, strict=True):
        with torch.no_grad():
            hidden = model.model(torch.tensor([prompt])).last_hidden_state[0, -1]
        torch.testing.assert_close(
            torch.tensor(vector), normalize(hidden, dim=0), atol=1e-4, rtol=1e-4
        )


def test_reloaded_weights(
    serve: Worker, checkpoint: Path, expected: list[list[int]]
) -> None:
    answer = serve.ask("generate", checkpoint, {}, reloads=True)

    assert answer.tokens == expected


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("feature", ON_A_GPU)
def test_the_same_tokens_on_a_gpu(
    serve: Worker, checkpoint: Path, expected: list[list[int]], feature: str
) -> None:
    assert serve(checkpoint, **ON_A_GPU[feature]).tokens == expected


@pytest.mark.gpu
@needs_gpu
def test_sleep_and_wake(
    serve: Worker, checkpoint: Path, expected: list[list[int]]
) -> None:
    answer = serve.ask("generate", checkpoint, {"enable_sleep_mode": True}, sleeps=True)

    assert answer.tokens == expected


@needs_cpu
def test_sleep_is_refused_on_a_cpu(serve: Worker, checkpoint: Path) -> None:
    answer = serve(checkpoint, enable_sleep_mode=True)

    assert answer.code != 0
    assert "Sleep mode is not supported on current platform" in answer.log


@pytest.mark.skipif(not HAS_FP8_CACHE, reason="needs a GPU or AVX-512")
def test_an_fp8_cache(
    serve: Worker, checkpoint: Path, expected: list[list[int]]
) -> None:
    tokens = serve(checkpoint, kv_cache_dtype="fp8").tokens

    pairs = [
        (new, old)
        for answer, exact in zip(tokens, expected, strict=True)
        for new, old in zip(answer, exact, strict=True)
    ]
    # Rounded keys and values change some tokens, and those after them.
    assert sum(new == old for new, old in pairs) > len(pairs) / 4


@pytest.mark.skipif(HAS_FP8_CACHE, reason="there is a GPU or AVX-512")
def test_an_fp8_cache_is_refused(serve: Worker, checkpoint: Path) -> None:
    answer = serve(checkpoint, kv_cache_dtype="fp8")

    assert answer.code != 0
    refusals = (
        "FP8 KV cache on CPU requires x86 with AVX-512 or AMX",
        # Since 0.33.
        "--kv-cache-dtype fp8 is not supported by the CPU attention backend",
    )
    assert any(words in answer.log for words in refusals)


def test_a_lora_adapter(
    serve: Worker, checkpoint: Path, expected: list[list[int]], tmp_path: Path
) -> None:
    """Made on the packed model, it does what it does on the dequantized one."""
    pytest.importorskip("peft", reason="PEFT is not installed")
    adapted = adapted_tokens(checkpoint, tmp_path)

    answer = serve.ask_adapter(checkpoint, tmp_path)

    assert answer.tokens == adapted
    assert answer.tokens != expected
