from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

import tacq_vllm.integrations.transformers  # noqa: F401 - registers the quantizer
from tacq_vllm.layers import TacqLinear

pytest.importorskip("peft")

from peft import LoraConfig, PeftModel, get_peft_model

from tacq_vllm.integrations.peft import TacqLoraLinear, with_packed_linears

pytestmark = pytest.mark.filterwarnings("error::UserWarning:peft.*")

TARGETS = ["q_proj", "v_proj", "down_proj"]


def load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def with_adapter(model: PreTrainedModel, **options: object) -> PeftModel:
    torch.manual_seed(0)
    options = {"target_modules": TARGETS} | options
    config = LoraConfig(r=4, task_type="CAUSAL_LM", **options)
    return get_peft_model(model, with_packed_linears(config))


def losses(model: PeftModel, tokens: Tensor, steps: int) -> list[float]:
    """The loss before each step of training, and after the last."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    values = []
    for _ in range(steps):
        loss = model(tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    with torch.no_grad():
        return [*values, model(tokens, labels=tokens).loss.item()]


def test_two_steps_lower_the_loss(tiny_checkpoint: Path, tokens: Tensor) -> None:
    packed = load(tiny_checkpoint)
    before = {name: buffer.clone() for name, buffer in packed.named_buffers()}
    model = with_adapter(packed)

    first, second, third = losses(model, tokens, steps=2)

    assert third < second < first
    adapted = [m for m in model.modules() if isinstance(m, TacqLoraLinear)]
    assert len(adapted) == 2 * len(TARGETS)
    assert all(isinstance(m.base_layer, TacqLinear) for m in adapted)
    trained = {n for n, p in model.named_parameters() if p.grad is not None}
    assert len(trained) == 2 * len(adapted)
    assert all("lora_" in name for name in trained)
    # The packed weights are as they were.
    for name, buffer in packed.named_buffers():
        assert torch.equal(buffer, before[name.replace(".base_layer", "")])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_is_that_of_the_dequantized_model(
    tiny_checkpoint: Path, tokens: Tensor, checkpointing: bool
) -> None:
    packed = with_adapter(load(tiny_checkpoint))
    dense = with_adapter(load(tiny_checkpoint).dequantize())
    if checkpointing:
        packed.train()
        packed.gradient_checkpointing_enable()

    assert losses(packed, tokens, 2) == pytest.approx(losses(dense, tokens, 2), 1e-4)


def test_a_saved_adapter_fits_the_packed_and_the_dense_model(
    tiny_checkpoint: Path, tmp_path: Path, tokens: Tensor
) -> None:
    model = with_adapter(load(tiny_checkpoint))
    losses(model, tokens, steps=2)
    model.save_pretrained(tmp_path)

    config = with_packed_linears(LoraConfig.from_pretrained(tmp_path))
    packed = PeftModel.from_pretrained(load(tiny_checkpoint), tmp_path, config=config)
    dense = PeftModel.from_pretrained(load(tiny_checkpoint).dequantize(), tmp_path)

    with torch.no_grad():
        expected = model.eval()(tokens).logits
        assert torch.equal(packed.eval()(tokens).logits, expected)
        logits = dense.eval()(tokens).logits
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
        plain = load(tiny_checkpoint)(tokens).logits
        assert (expected - plain).norm() > 0.01 * plain.norm()
        merged = dense.merge_and_unload()(tokens).logits
        torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-4)


def test_trainer(tiny_checkpoint: Path, tmp_path: Path, tokens: Tensor) -> None:
    pytest.importorskip("accelerate")
    model = with_adapter(load(tiny_checkpoint))
    samples = [{"input_ids": row, "labels": row} for row in tokens]
    arguments = TrainingArguments(
        tmp_path, max_steps=2, learning_rate=0.01, report_to=[], save_strategy="no"
    )
    before = losses(model, tokens, steps=0)

    Trainer(model, arguments, train_dataset=samples).train()

    assert losses(model.cpu(), tokens, steps=0) < before


def test_what_needs_the_weight_is_refused(tiny_checkpoint: Path) -> None:
    with pytest.raises(NotImplementedError, match="cannot be merged into packed"):
        with_adapter(load(tiny_checkpoint)).merge_and_unload()
    with pytest.raises(ValueError, match=r"unsupported variant combination.*use_dora"):
        with_adapter(load(tiny_checkpoint), use_dora=True)


def test_target_modules_are_named(tiny_checkpoint: Path) -> None:
    with pytest.raises(ValueError, match="No `target_modules` passed"):
        with_adapter(load(tiny_checkpoint), target_modules="all-linear")
