"""The order of the passes that make a TaCQ checkpoint (TaCQ paper, section 3).

1. GPTQ of the whole model without kept weights gives Q(W).
2. Gradients of the 16-bit model on the calibration text give |∂L/∂W|.
3. One budget picks the weights with the highest score.
4. GPTQ again, those weights out of the grid and kept in 16 bits, gives the checkpoint.

Each pass keeps its results in the work folder, under a fingerprint of what they depend
on: a run goes on where one before it has stopped, and one with another ratio or other
bits finds the gradients.
"""

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from tacq_vllm.config import Recipe
from tacq_vllm.format.schema import check_linear_shape
from tacq_vllm.quantize import gradients
from tacq_vllm.quantize.calibration import calibrate
from tacq_vllm.quantize.depends import Depends, common_depends, digest
from tacq_vllm.quantize.errors import QuantizeError
from tacq_vllm.quantize.export import WriteCard, export_checkpoint
from tacq_vllm.quantize.layerwise import GptqPass, Masks, QuantizedBlocks
from tacq_vllm.quantize.model import BaseModel
from tacq_vllm.quantize.progress import Progress
from tacq_vllm.quantize.saliency import (
    gradient_power,
    needs_gradients,
    needs_quantized,
    saliency,
)
from tacq_vllm.quantize.samples import Sample
from tacq_vllm.quantize.selection import select_top
from tacq_vllm.quantize.workdir import (
    PhaseFolder,
    WorkDir,
    check_output,
    fingerprint,
)
from tacq_vllm.quantize.world import World


def quantize_model(
    base: BaseModel,
    recipe: Recipe,
    output: Path,
    workdir: WorkDir,
    progress: Progress,
    write_card: WriteCard,
    data_root: Path | None = None,
    world: World | None = None,
) -> None:
    """Make a checkpoint folder.

    Args:
        base: the 16-bit model.
        recipe: what to do.
        output: the folder to make; appears only when whole.
        workdir: where finished phases keep their tensors.
        progress: told of every phase and linear.
        write_card: adds the model card to a folder with all weights, given the
            quantization block.
        data_root: folder of the named calibration sets; None: the Hub.
        world: the processes that share the work; None: this one alone.

    Raises:
        QuantizeError: the model, the recipe or the calibration text do not fit.
    """
    check_output(output)
    _check_model(base, recipe, progress)
    world = world or World()
    common = common_depends(base, world)
    samples = calibrate(
        base, recipe.calibration, common, data_root, workdir, progress, world
    )
    run = _Run(base, recipe, samples, common, workdir, progress, world)
    blocks = run.quantize()
    if world.leads:
        export_checkpoint(base, recipe, output, blocks, progress, write_card)
    world.wait()


class _Run:
    """One recipe on one model: the passes, and what each depends on."""

    def __init__(
        self,
        base: BaseModel,
        recipe: Recipe,
        samples: list[Sample],
        common: Depends,
        workdir: WorkDir,
        progress: Progress,
        world: World,
    ) -> None:
        self._base = base
        self._recipe = recipe
        self._samples = samples
        self._workdir = workdir
        self._progress = progress
        self._world = world
        tokens = digest(sample.tokens.numpy().tobytes() for sample in samples)
        self._common = {**common, "tokens": tokens}

    def quantize(self) -> QuantizedBlocks:
        """All passes; the blocks of the last."""
        budget = int(self._recipe.outlier_ratio * self._num_weights())
        if budget == 0:
            return self._gptq("quantization", self._gptq_depends(), lambda name: None)
        metric = self._recipe.outliers.saliency
        chosen: Depends = self._recipe.outliers.model_dump(mode="json")
        plain: QuantizedBlocks | None = None
        gradient: PhaseFolder | None = None
        if needs_quantized(metric):
            depends = self._gptq_depends()
            plain = self._gptq("plain quantization", depends, lambda name: None)
            chosen["plain"] = fingerprint(depends)
        if needs_gradients(metric):
            depends = self._gradient_depends()
            gradient = self._gradients(depends)
            chosen["gradients"] = fingerprint(depends)

        def scores(name: str) -> Tensor:
            W = self._base.weight(name)
            loaded = (
                gradients.load_gradient(self._base, gradient, name) if gradient else W
            )
            return saliency(metric, W, loaded, plain.weight(name) if plain else W)

        masks = self._select(scores, budget)
        depends = self._gptq_depends() | {"outliers": chosen}
        return self._gptq("quantization", depends, masks)

    def _gradients(self, depends: Depends) -> PhaseFolder:
        folder = self._open("gradients", depends)
        gradients.accumulate_gradients(
            self._base,
            self._samples,
            gradient_power(self._recipe.outliers.saliency),
            folder,
            self._progress,
            self._world,
        )
        return folder

    def _gptq(self, phase: str, depends: Depends, masks: Masks) -> QuantizedBlocks:
        folder = self._open("gptq", depends)
        return GptqPass(
            self._base, self._recipe, self._samples, masks, folder, self._world
        ).run(phase, self._progress)

    def _open(self, name: str, depends: Depends) -> PhaseFolder:
        """The folder of a phase; what made an earlier one useless is told."""
        with self._world.leader_first():
            changes = self._workdir.differences(name, depends)
            folder = self._workdir.phase(name, depends)
        if changes and folder.is_empty:
            self._progress.note(f"{name}: computed anew: {'; '.join(changes)}")
        return folder

    def _gptq_depends(self) -> Depends:
        recipe = self._recipe
        return {
            **self._common,
            "bits": recipe.bits,
            "group_size": recipe.group_size,
            "dtype": self._base.storage_dtype(recipe.export.dtype),
            "gptq": recipe.gptq.model_dump(mode="json"),
        }

    def _gradient_depends(self) -> Depends:
        return {
            **self._common,
            "scored": digest(s.scored.numpy().tobytes() for s in self._samples),
            "power": gradient_power(self._recipe.outliers.saliency),
        }

    def _select(self, scores: Callable[[str], Tensor], budget: int) -> Masks:
        linears = self._base.linears()
        if self._recipe.outliers.scope == "model":
            selection = select_top(linears, scores, budget)
            return lambda name: selection.mask(name, scores(name))
        ratio = self._recipe.outlier_ratio

        def mask(name: str) -> Tensor:
            values = scores(name)
            count = int(ratio * values.numel())
            return select_top([name], lambda _: values, count).mask(name, values)

        return mask

    def _num_weights(self) -> int:
        return sum(m.weight.numel() for m in self._base.linears().values())


def _check_model(base: BaseModel, recipe: Recipe, progress: Progress) -> None:
    linears = base.linears()
    if not linears:
        raise QuantizeError(
            f"{type(base.model).__name__}: {base.block_name(0)} has no linears under "
            "self_attn or mlp: this architecture is not supported"
        )
    for name, linear in linears.items():
        try:
            check_linear_shape(
                name, linear.out_features, linear.in_features, recipe.group_size
            )
        except ValueError as error:
            raise QuantizeError(str(error)) from error
    left = base.unquantized_modules()
    if left:
        quantized = sum(linear.weight.numel() for linear in linears.values())
        share = sum(left.values()) / (quantized + sum(left.values()))
        progress.note(
            f"{next(iter(left))} and {len(left) - 1} more modules are not quantized "
            f"and stay in 16 bits: {share:.1%} of the weights of the blocks"
        )
