"""The model in training, before it is trained."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    Qwen2Config,
    Qwen3MoeConfig,
)

import tacq_vllm.integrations.transformers  # noqa: F401
from tacq_vllm.config import Recipe
from tacq_vllm.format.checkpoint import read_schema
from tacq_vllm.format.schema import DEFAULT_CIRCUIT, QuantizationSchema
from tacq_vllm.recover.batches import Batch, stack_samples
from tacq_vllm.recover.config import RecoverConfig
from tacq_vllm.recover.student import Student, open_student, replace_linears
from tests.conftest import (
    SIZES,
    open_model,
    quick,
    random_samples,
    run_pipeline,
    save_random,
)

CPU = torch.device("cpu")
FAMILIES: dict[str, PretrainedConfig] = {
    # Tied embeddings, and biases that are not quantized.
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=True, attention_bias=True),
    "qwen2": Qwen2Config(**SIZES),
    # Scaled embeddings, logits squeezed, norms around 1.
    "gemma3": Gemma3TextConfig(
        **SIZES,
        head_dim=16,
        final_logit_softcapping=5.0,
        layer_types=["sliding_attention", "full_attention"],
        sliding_window=8,
    ),
    # Experts and routers that are not quantized.
    "qwen3_moe": Qwen3MoeConfig(
        **SIZES,
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
    ),
}


def batch_of(*lengths: int) -> Batch:
    return stack_samples(random_samples(*lengths), None, CPU)


def logits(student: Student, tokens: Tensor) -> Tensor:
    return student.model(input_ids=tokens, use_cache=False).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_it_says_what_the_checkpoint_says(
    family: str, tiny_recipe: Recipe, tokens: Tensor, tmp_path: Path
):
    model = save_random(FAMILIES[family], tmp_path / "model")
    base = open_model(model, tmp_path / "work")
    run_pipeline(base, quick(tiny_recipe), tmp_path / "out", tmp_path / "work")
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32
    ).eval()
    loaded.dequantize()
    schema = read_schema(tmp_path / "out")

    student = open_student(base, tmp_path / "out", schema, RecoverConfig())
    batch = batch_of(20, 20)
    losses = student(batch, 0.0)
    losses.total.backward()

    with torch.no_grad():
        torch.testing.assert_close(
            logits(student, tokens), loaded(tokens).logits, rtol=1e-4, atol=1e-4
        )
        whole = loaded(batch.tokens).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(
        whole.flatten(0, 1), batch.targets.flatten(), reduction="sum"
    )
    torch.testing.assert_close(losses.text, expected, rtol=1e-4, atol=1e-4)
    # Every trained value learns, the first A aside: its B is zero.
    for name, parameter in student.trained_state().items():
        assert bool(parameter.grad.any()) != name.endswith(".A"), name
    assert student.linears().keys() == schema.linears.keys()


def tiny_student(tiny_base: Any, tiny_checkpoint: Path, **choices: Any) -> Student:
    config = RecoverConfig(**choices)
    schema = read_schema(tiny_checkpoint)
    student = open_student(tiny_base, tiny_checkpoint, schema, config)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in student.trained_state().items():
        if name.endswith(".B"):
            parameter.data.normal_(std=0.1, generator=generator)
    return student


def gradients(student: Student, *batches: Batch) -> dict[str, Tensor]:
    for batch in batches:
        student(batch, 0.0).total.backward()
    return {name: p.grad for name, p in student.trained_state().items()}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(
            gradient, expected[name], rtol=1e-3, atol=1e-4, msg=name
        )


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@torch.no_grad()
def test_it_is_compared_with_the_teacher_token_by_token(
    tiny_base: Any, tiny_checkpoint: Path, temperature: float
):
    student = tiny_student(tiny_base, tiny_checkpoint, temperature=temperature)
    samples = random_samples(9, 6)
    generator = torch.Generator().manual_seed(1)
    states = [
        torch.randn(len(sample.tokens), 64, generator=generator) for sample in samples
    ]

    found = student(stack_samples(samples, states, CPU), 1.0).total

    expected = torch.zeros(())
    for sample, given in zip(samples, states, strict=True):
        own = logits(student, sample.tokens[None])[0]
        other = student.model.get_output_embeddings()(given)
        q, p = (
            torch.softmax(values[:-1][sample.scored[1:]] / temperature, -1)
            for values in (own, other)
        )
        expected += temperature**2 * (p * (p.log() - q.log())).sum()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_padding_changes_nothing(tiny_base, tiny_checkpoint):
    one, two = random_samples(20, 7)
    together = stack_samples([one, two], None, CPU)
    alone = [stack_samples([sample], None, CPU) for sample in (one, two)]

    found = gradients(tiny_student(tiny_base, tiny_checkpoint), together)
    expected = gradients(tiny_student(tiny_base, tiny_checkpoint), *alone)

    assert_close(found, expected)


def test_computing_blocks_twice_changes_nothing(tiny_base, tiny_checkpoint):
    calls = []

    def run(checkpointing: bool) -> dict[str, Tensor]:
        student = tiny_student(
            tiny_base, tiny_checkpoint, gradient_checkpointing=checkpointing
        )
        norm = student.model.model.layers[0].input_layernorm
        norm.register_forward_hook(lambda *args: calls.append(checkpointing))
        return gradients(student, batch_of(20))

    assert_close(run(True), run(False))
    assert calls == [True, True, False]


def test_weights_are_held_in_16_bits(tiny_base, tiny_checkpoint):
    student = tiny_student(tiny_base, tiny_checkpoint)

    tensors = [*student.model.parameters(), *student.model.buffers()]
    large = [t for t in tensors if t.dim() == 2 and t.numel() > 2000]
    assert large
    assert {t.dtype for t in large} == {torch.bfloat16}


def count_share(
    config: PretrainedConfig, group_size: int, **choices: object
) -> tuple[int, float]:
    """Trained values of a model of a shape, and their share, without its weights."""
    with init_empty_weights():
        model = LlamaForCausalLM(config).requires_grad_(False)
    model.tie_weights()
    linears = {
        name: tuple(module.weight.shape)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }
    ratio = 0.0035
    schema = QuantizationSchema(
        bits=3,
        group_size=group_size,
        dtype="bfloat16",
        linears=linears,
        circuits={
            DEFAULT_CIRCUIT: {n: int(ratio * o * i) for n, (o, i) in linears.items()}
        },
    )
    replace_linears(model, schema, RecoverConfig(**choices))
    student = Student(model, RecoverConfig())
    trained = sum(p.numel() for p in student.trained_state().values())
    return trained, student.trained_share()


LLAMA_7B = LlamaConfig(tie_word_embeddings=False)
SMOLLM2 = LlamaConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    tie_word_embeddings=True,
)


def test_less_than_a_hundredth_of_llama_7b_is_trained():
    trained, share = count_share(LLAMA_7B, 128)

    # 32 blocks; q, k, v, o [4096, 4096], gate and up [11008, 4096], down.
    weights = 4 * 4096**2 + 3 * 4096 * 11008
    low_rank = 4 * (4 * 8192 + 3 * 15104)
    assert trained == 32 * (weights // 128 + low_rank)
    assert share == pytest.approx(trained / 6_738_415_616)
    assert share < 0.01


@pytest.mark.parametrize(
    ("config", "group_size", "choices", "percent"),
    [
        (LLAMA_7B, 128, {}, 0.90),
        (LLAMA_7B, 128, {"train": "magnitude"}, 0.75),
        (LLAMA_7B, 128, {"train": "lora"}, 0.15),
        (LLAMA_7B, 128, {"train_outliers": True}, 1.24),
        (SMOLLM2, 64, {}, 2.14),
        (SMOLLM2, 64, {"train": "magnitude"}, 1.23),
        (SMOLLM2, 64, {"train": "lora"}, 0.91),
    ],
)
def test_the_shares_that_the_page_names(config, group_size, choices, percent):
    _, share = count_share(config, group_size, **choices)

    assert round(100 * share, 2) == pytest.approx(percent, abs=0.006)
