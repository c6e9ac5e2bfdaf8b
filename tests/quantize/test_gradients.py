from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tacq_vllm.quantize.blocks import BlockCalls
from tacq_vllm.quantize.errors import QuantizeError
from tacq_vllm.quantize.gradients import accumulate_gradients, load_gradient
from tacq_vllm.quantize.model import BaseModel
from tacq_vllm.quantize.progress import Progress
from tacq_vllm.quantize.samples import Sample
from tacq_vllm.quantize.workdir import PhaseFolder
from tacq_vllm.quantize.world import World
from tests.builders import rewrite_tensors
from tests.conftest import (
    Recorder,
    assert_released,
    is_equal,
    open_model,
    random_samples,
)
from tests.interruptions import interrupted_at_file, interrupted_at_removal

LENGTHS = (12, 5, 12, 30, 2)


def gradients(
    base: BaseModel,
    samples: list[Sample],
    folder: PhaseFolder,
    power: int = 1,
    listener: Recorder | None = None,
) -> dict[str, Tensor]:
    accumulate_gradients(base, samples, power, folder, Progress(listener), World())
    return {name: load_gradient(base, folder, name) for name in base.linears()}


def plain_gradients(
    model: PreTrainedModel, names: list[str], samples: list[Sample], power: int
) -> dict[str, Tensor]:
    """The same sums by the loss and the backward pass of the whole model."""
    sums: dict[str, Tensor] = {}
    for sample in samples:
        labels = sample.tokens.clone()
        labels[~sample.scored] = -100
        model.zero_grad()
        model(sample.tokens[None], labels=labels[None]).loss.backward()
        for name in names:
            gradient = model.get_submodule(name).weight.grad.abs() ** power
            sums[name] = sums.get(name, 0) + gradient
    return sums


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("completions_only", [False, True])
def test_they_are_those_of_the_whole_model(
    tiny_base: BaseModel,
    plain_model: PreTrainedModel,
    phase_folder: PhaseFolder,
    power: int,
    completions_only: bool,
) -> None:
    samples = random_samples(*LENGTHS)
    if not completions_only:
        samples = [Sample.of(sample.tokens) for sample in samples]

    sums = gradients(tiny_base, samples, phase_folder, power)

    names = list(tiny_base.linears())
    expected = plain_gradients(plain_model, names, samples, power)
    assert list(sums) == names
    for name, total in sums.items():
        assert bool(total.any())
        scale = float(expected[name].max())
        torch.testing.assert_close(total, expected[name], rtol=1e-3, atol=1e-6 * scale)
    assert_released(tiny_base)


def test_what_counts_in_the_loss_matters(
    tiny_base: BaseModel, phase_folder: PhaseFolder, tmp_path: Path
) -> None:
    samples = random_samples(*LENGTHS)
    other = PhaseFolder(tmp_path)

    parts = gradients(tiny_base, samples, phase_folder)
    whole = gradients(tiny_base, [Sample.of(s.tokens) for s in samples], other)

    for name, total in parts.items():
        assert float((total - whole[name]).norm()) > 0.05 * float(total.norm())


def test_the_order_of_samples_is_no_matter(
    tiny_base: BaseModel, phase_folder: PhaseFolder, tmp_path: Path
) -> None:
    samples = random_samples(*LENGTHS)

    sums = gradients(tiny_base, samples, phase_folder)
    others = gradients(tiny_base, samples[::-1], PhaseFolder(tmp_path))

    assert is_equal(sums, others)


def test_logits_of_a_few_tokens_are_in_memory_at_a_time(
    tiny_base: BaseModel,
    phase_folder: PhaseFolder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    samples, tokens = random_samples(*LENGTHS), []
    logits = BlockCalls.logits

    def record(calls: BlockCalls, hidden: Tensor) -> Tensor:
        tokens.append(hidden.shape[1])
        return logits(calls, hidden)

    monkeypatch.setattr(BlockCalls, "logits", record)
    whole = gradients(tiny_base, samples, phase_folder)
    assert tuple(tokens) == LENGTHS
    tokens.clear()
    monkeypatch.setattr("tacq_vllm.quantize.gradients._HEAD_TOKENS", 8)
    parts = gradients(tiny_base, samples, PhaseFolder(tmp_path))

    assert tokens == [8, 4, 5, 8, 4, 8, 8, 8, 6, 2]
    for name, total in parts.items():
        scale = float(whole[name].max())
        torch.testing.assert_close(total, whole[name], rtol=1e-4, atol=1e-6 * scale)


def test_one_block_is_in_memory_at_a_time(
    tiny_base: BaseModel, phase_folder: PhaseFolder
) -> None:
    resident: list[set[int]] = []

    def record(module: object, args: object) -> None:
        with_values = {
            index
            for index, block in enumerate(tiny_base.blocks)
            if not all(parameter.is_meta for parameter in block.parameters())
        }
        resident.append(with_values)
        assert tiny_base.model.lm_head.weight.is_meta

    hooks = [
        linear.register_forward_pre_hook(record)
        for linear in tiny_base.linears().values()
    ]
    gradients(tiny_base, random_samples(4, 4), phase_folder)
    for hook in hooks:
        hook.remove()

    # Forward and backward, two samples, seven linears.
    expected = [{0}, {1}, {1}, {0}]
    assert resident == [part for part in expected for _ in range(2 * 7)]


ONLY_SUMS = {"passed-0000", "passed-0001", "head", "sums-0000", "sums-0001"}


def names(folder: PhaseFolder) -> set[str]:
    return {path.stem for path in folder.folder.glob("*.safetensors*")}


def test_only_the_sums_stay_on_disk(
    tiny_base: BaseModel, phase_folder: PhaseFolder
) -> None:
    recorder = Recorder()

    gradients(tiny_base, random_samples(4, 6), phase_folder, listener=recorder)

    assert names(phase_folder) == ONLY_SUMS
    assert recorder.phases == {"gradients": 4}
    assert recorder.notes == []


def test_what_is_stored_is_not_computed_again(
    tiny_base: BaseModel, phase_folder: PhaseFolder
) -> None:
    samples = random_samples(4, 6)
    first = gradients(tiny_base, samples, phase_folder)
    recorder = Recorder()

    again = gradients(tiny_base, samples, phase_folder, listener=recorder)

    assert recorder.phases == {}
    assert recorder.notes == ["gradients: taken from the work folder"]
    assert is_equal(first, again)


@pytest.mark.parametrize("step", [1, 2, 3, 4])
def test_an_interrupted_pass_goes_on(
    tiny_base: BaseModel, phase_folder: PhaseFolder, tmp_path: Path, step: int
) -> None:
    samples = random_samples(*LENGTHS)
    stop, recorder = Recorder("gradients", step), Recorder()
    with pytest.raises(KeyboardInterrupt):
        gradients(tiny_base, samples, phase_folder, listener=stop)
    assert_released(tiny_base)

    resumed = gradients(tiny_base, samples, phase_folder, listener=recorder)

    if step < 4:
        assert recorder.phases == {"gradients": 4 - step}
        (note,) = recorder.notes
        assert note == f"gradients: {step} of 4 steps taken from the work folder"
    assert is_equal(resumed, gradients(tiny_base, samples, PhaseFolder(tmp_path)))


@pytest.mark.parametrize("count", range(1, 16))
def test_a_pass_goes_on_after_any_file(
    tiny_base: BaseModel, phase_folder: PhaseFolder, tmp_path: Path, count: int
) -> None:
    """What goes in and out of two blocks, for two samples, and what marks the ends."""
    samples = random_samples(12, 5)
    with interrupted_at_file(count):
        gradients(tiny_base, samples, phase_folder)

    resumed = gradients(tiny_base, samples, phase_folder)

    assert is_equal(resumed, gradients(tiny_base, samples, PhaseFolder(tmp_path)))


@pytest.mark.parametrize("count", [1, 4, 10])
def test_what_an_interrupted_clean_up_has_left_goes(
    tiny_base: BaseModel, phase_folder: PhaseFolder, count: int
) -> None:
    """After the head, after a block, and where no step is left."""
    samples = random_samples(4, 6)
    with interrupted_at_removal(count):
        gradients(tiny_base, samples, phase_folder)
    assert names(phase_folder) - ONLY_SUMS

    gradients(tiny_base, samples, phase_folder)

    assert names(phase_folder) == ONLY_SUMS


def test_a_gradient_that_is_not_finite_is_refused(
    model_copy: Path, tmp_path: Path, phase_folder: PhaseFolder
) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    rewrite_tensors(model_copy, lambda tensors: tensors[name].fill_(3e38))
    base = open_model(model_copy, tmp_path / "work")

    # However often it is tried: nothing that is refused is stored, of any block.
    for _ in range(3):
        with pytest.raises(
            QuantizeError, match=r"layers\.\S+: a gradient is not finite"
        ):
            gradients(base, random_samples(4), phase_folder)
    assert_released(base)
