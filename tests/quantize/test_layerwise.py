from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tacq_vllm.config import Recipe
from tacq_vllm.format.stored import unpack_outliers
from tacq_vllm.quantize.blocks import group_linears
from tacq_vllm.quantize.errors import QuantizeError
from tacq_vllm.quantize.gptq import Hessian, quantize_matrix, relative_error
from tacq_vllm.quantize.layerwise import BlockPass
from tacq_vllm.quantize.methods.gptq import gptq_rounder
from tacq_vllm.quantize.methods.packed import Masks, keep_none
from tacq_vllm.quantize.methods.simulated import SimulatedRounder
from tacq_vllm.quantize.model import BaseModel
from tacq_vllm.quantize.progress import Progress
from tacq_vllm.quantize.result import SimulatedResult
from tacq_vllm.quantize.rounder import GroupInputs
from tacq_vllm.quantize.samples import Sample
from tacq_vllm.quantize.workdir import PhaseFolder, WorkDir
from tacq_vllm.quantize.world import World
from tests.builders import rewrite_tensors
from tests.conftest import (
    Recorder,
    assert_released,
    open_model,
    quick,
    random_samples,
)
from tests.quantize.block_pass import LENGTHS, names, quantize


def keep_some(name: str) -> Tensor:
    """Random weights of a linear of the tiny model, no two linears the same."""
    generator = torch.Generator().manual_seed(sum(name.encode()))
    out_features = {"k_proj": 32, "v_proj": 32, "gate_proj": 128, "up_proj": 128}
    shape = (
        out_features.get(name.split(".")[-1], 64),
        128 if name.endswith("down_proj") else 64,
    )
    return torch.rand(shape, generator=generator) < 0.02


@torch.no_grad()
def observe(model: PreTrainedModel, linear: str, samples: list[Sample]) -> Hessian:
    """The Hessian of a linear's inputs, by running the whole model on each sample."""
    module = model.get_submodule(linear)
    hessian = Hessian(module.in_features, torch.device("cpu"))
    hook = module.register_forward_pre_hook(lambda module, args: hessian.add(args[0]))
    for sample in samples:
        model(sample.tokens[None])
    hook.remove()
    return hessian


def naively_quantize(
    model: PreTrainedModel, groups: list[list[str]], recipe: Recipe, masks: Masks
) -> dict[str, tuple[Tensor, float]]:
    """One linear after another in the whole model: its weight and its error."""
    results: dict[str, tuple[Tensor, float]] = {}
    for group in groups:
        H = observe(model, group[0], random_samples(*LENGTHS)).mean()
        for name in group:
            W = model.get_submodule(name).weight.data
            result = quantize_matrix(
                W,
                H,
                masks(name),
                bits=recipe.bits,
                group_size=recipe.group_size,
                dtype=torch.bfloat16,
                keep_original=recipe.outliers.kept_value == "original",
                config=recipe.gptq,
            )
            results[name] = result.weight, relative_error(W, result.weight, H)
        for name in group:
            model.get_submodule(name).weight.data = results[name][0]
    return results


def groups_of(base: BaseModel) -> list[list[str]]:
    blocks = (base.block_linears(index) for index in range(len(base.blocks)))
    return [list(group) for linears in blocks for group in group_linears(linears)]


@pytest.mark.parametrize(
    ("masks", "kept_value"),
    [(keep_none, "original"), (keep_some, "original"), (keep_some, "compensated")],
)
def test_it_is_what_is_done_with_the_whole_model(
    tiny_base: BaseModel,
    plain_model: PreTrainedModel,
    tiny_recipe: Recipe,
    phase_folder: PhaseFolder,
    masks: Masks,
    kept_value: str,
) -> None:
    recipe = quick(tiny_recipe, **{"outliers.kept_value": kept_value})

    blocks = quantize(tiny_base, recipe, phase_folder, masks=masks)

    expected = naively_quantize(plain_model, groups_of(tiny_base), recipe, masks)
    reports = {report.name: report for report in blocks.reports()}
    assert list(reports) == list(expected) == list(tiny_base.linears())
    for name, (weight, error) in expected.items():
        # A sum in another order may move a value across the middle of two codes.
        same = (blocks.weight(name) == weight).float().mean()
        assert float(same) > 0.998, name
        assert reports[name].error == pytest.approx(error, rel=1e-3)
    assert_released(tiny_base)


def test_later_linears_are_quantized_on_what_earlier_ones_produce(
    tiny_base: BaseModel, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    work = WorkDir(tmp_path / "work")
    changed = "model.layers.0.self_attn.v_proj"

    def keep_in_one(name: str) -> Tensor:
        mask = keep_some(name)
        return mask if name == changed else torch.zeros_like(mask)

    plain, other = (
        quantize(tiny_base, quick(tiny_recipe), work.phase(name, {}), masks=masks)
        for name, masks in (("plain", keep_none), ("other", keep_in_one))
    )

    linears = list(tiny_base.linears())
    same = [torch.equal(plain.weight(name), other.weight(name)) for name in linears]
    assert same == [name in linears[:2] for name in linears]


def test_masks_say_which_weights_are_kept(
    tiny_base: BaseModel, tiny_recipe: Recipe, phase_folder: PhaseFolder
) -> None:
    blocks = quantize(tiny_base, quick(tiny_recipe), phase_folder, masks=keep_some)

    for report in blocks.reports():
        kept = keep_some(report.name)
        W = tiny_base.weight(report.name)
        assert report.outliers == int(kept.sum()) > 0
        assert torch.equal(blocks.weight(report.name)[kept], W[kept])
        outliers = unpack_outliers(blocks.packed(report.name))
        assert outliers.rows.tolist() == kept.nonzero()[:, 0].tolist()
        assert outliers.columns.tolist() == kept.nonzero()[:, 1].tolist()


def test_reports(
    tiny_base: BaseModel, tiny_recipe: Recipe, phase_folder: PhaseFolder
) -> None:
    recorder = Recorder()

    blocks = quantize(tiny_base, tiny_recipe, phase_folder, listener=recorder)

    assert recorder.phases == {"gptq": 14}
    assert recorder.notes == []
    for report in blocks.reports():
        assert (report.bits, report.group_size, report.outliers) == (3, 32, 0)
        assert report.damp_percent == 0.01
        W = tiny_base.weight(report.name)
        assert 0 < report.error < 0.1
        # Three bits of a normal distribution.
        assert (blocks.weight(report.name) - W).norm() < 0.35 * W.norm()
    assert len(blocks.seconds()) == 2
    assert all(0 < seconds < 60 for seconds in blocks.seconds())


def test_the_error_is_that_of_the_outputs(
    tiny_base: BaseModel,
    plain_model: PreTrainedModel,
    tiny_recipe: Recipe,
    phase_folder: PhaseFolder,
) -> None:
    """Of the first linear, whose inputs are those of the base model."""
    samples = random_samples(*LENGTHS)

    blocks = quantize(tiny_base, quick(tiny_recipe), phase_folder, samples=samples)

    name = "model.layers.0.self_attn.q_proj"
    H = observe(plain_model, name, samples).mean().double()
    W = tiny_base.weight(name).double()
    D = W - blocks.weight(name)
    error = torch.trace(D @ H @ D.T) / torch.trace(W @ H @ W.T)
    assert next(blocks.reports()).error == pytest.approx(float(error), rel=1e-3)


def test_tokens_are_sampled_all_over_the_text(
    tiny_base: BaseModel, plain_model: PreTrainedModel, phase_folder: PhaseFolder
) -> None:
    samples, found, seen = random_samples(40), [], []

    def quantize_linear(
        name: str, W: Tensor, inputs: GroupInputs | None
    ) -> SimulatedResult:
        found.append(inputs)
        raise KeyboardInterrupt

    rounder = SimulatedRounder(quantize_linear, 3, 32, torch.bfloat16, sample_tokens=10)
    blocks = BlockPass(tiny_base, rounder, samples, phase_folder, World())
    with pytest.raises(KeyboardInterrupt):
        blocks.run("sampling", Progress())

    module = plain_model.get_submodule("model.layers.0.self_attn.q_proj")
    module.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    plain_model(samples[0].tokens[None])
    torch.testing.assert_close(found[0].sample, seen[0][0, ::4])


def test_only_the_blocks_stay_on_disk(
    tiny_base: BaseModel, tiny_recipe: Recipe, phase_folder: PhaseFolder
) -> None:
    quantize(tiny_base, quick(tiny_recipe), phase_folder)

    assert names(phase_folder) == {"block-0000", "block-0001"}


@pytest.mark.parametrize(
    ("length", "processes", "expected"), [(32, 1, 8), (64, 1, 4), (32, 2, 4)]
)
def test_batches_in_memory_take_a_share_of_it(
    tiny_base: BaseModel,
    tiny_recipe: Recipe,
    phase_folder: PhaseFolder,
    monkeypatch: pytest.MonkeyPatch,
    length: int,
    processes: int,
    expected: int,
) -> None:
    """However long a sample is, and shared by all processes."""
    in_memory = []

    def record(*arguments: object) -> None:
        in_memory.append(arguments[2])
        raise KeyboardInterrupt

    linears = tiny_base.block_linears(0).values()
    features = sum(linear.in_features + linear.out_features for linear in linears)
    # A quarter holds 8 samples of 32 tokens in float32.
    memory = SimpleNamespace(available=4 * 8 * 32 * 4 * features)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    monkeypatch.setattr("tacq_vllm.quantize.layerwise.run_block", record)
    world = World(0, processes)
    rounder = gptq_rounder(quick(tiny_recipe), torch.bfloat16, keep_none, world)
    samples = random_samples(*[length] * 4)
    blocks = BlockPass(tiny_base, rounder, samples, phase_folder, world)

    with pytest.raises(KeyboardInterrupt):
        blocks.run("gptq", Progress())

    assert in_memory == [expected]


@pytest.mark.parametrize(
    ("module", "linears"),
    [
        ("0.input_layernorm", r"0\.self_attn\.q_proj, \S+k_proj, \S+v_proj"),
        ("1.post_attention_layernorm", r"1\.mlp\.gate_proj, \S+up_proj"),
    ],
)
def test_linears_that_cannot_be_quantized_are_named(
    model_copy: Path, tmp_path: Path, tiny_recipe: Recipe, module: str, linears: str
) -> None:
    weight = f"model.layers.{module}.weight"
    rewrite_tensors(model_copy, lambda tensors: tensors[weight].fill_(1e38))
    base = open_model(model_copy, tmp_path / "work")
    folder = WorkDir(tmp_path / "work").phase("gptq", {})

    with pytest.raises(QuantizeError, match=rf"{linears}: the Hessian is not finite"):
        quantize(base, quick(tiny_recipe), folder)
    assert_released(base)
