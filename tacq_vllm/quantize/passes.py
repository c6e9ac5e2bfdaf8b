"""The passes that methods are made of.

Each pass keeps its results in the work folder, under a fingerprint of what they depend
on: a run goes on where one before it has stopped, and one with another ratio or other
bits finds the gradients.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from tacq_vllm.config import Recipe, StorageDtype
from tacq_vllm.format.schema import check_linear_shape, storage_dtype
from tacq_vllm.quantize import gradients
from tacq_vllm.quantize.calibration import calibrate
from tacq_vllm.quantize.depends import Depends, common_depends, digest
from tacq_vllm.quantize.errors import QuantizeError
from tacq_vllm.quantize.layerwise import BlockPass
from tacq_vllm.quantize.model import BaseModel
from tacq_vllm.quantize.progress import Progress
from tacq_vllm.quantize.quantized import REPORT_FIELDS, QuantizedBlocks
from tacq_vllm.quantize.rounder import Rounder
from tacq_vllm.quantize.samples import Sample
from tacq_vllm.quantize.workdir import PhaseFolder, WorkDir, fingerprint
from tacq_vllm.quantize.world import World


@dataclass(frozen=True)
class Gradients:
    """Stored sums of |∂L/∂W|**power over the calibration samples."""

    base: BaseModel
    folder: PhaseFolder
    fingerprint: str
    """Digest of what they depend on."""

    def load(self, linear: str) -> Tensor:
        """The sum of one linear: float32 [out, in] on the model's device."""
        return gradients.load_gradient(self.base, self.folder, linear)


class Passes:
    """What can be done with one model, one recipe and one work folder.

    Args:
        base: the 16-bit model.
        recipe: what to do.
        workdir: where finished phases keep their tensors.
        progress: told of every phase and linear.
        world: the processes that share the work.
        data_root: folder of the named calibration sets; None: the Hub.
    """

    def __init__(
        self,
        base: BaseModel,
        recipe: Recipe,
        workdir: WorkDir,
        progress: Progress,
        world: World,
        data_root: Path | None,
    ) -> None:
        self.base = base
        self.recipe = recipe
        self.world = world
        self._workdir = workdir
        self._progress = progress
        self._data_root = data_root

    @property
    def dtype_name(self) -> StorageDtype:
        """The 16-bit type of the checkpoint, by name."""
        return self.base.storage_dtype(self.recipe.export.dtype)

    @property
    def dtype(self) -> torch.dtype:
        """The 16-bit type of the checkpoint."""
        return storage_dtype(self.dtype_name)

    def num_weights(self) -> int:
        """Weights of all linears that are quantized."""
        return sum(linear.weight.numel() for linear in self.base.linears().values())

    def gradients(self, power: int) -> Gradients:
        """Gradients of the 16-bit model on the calibration text, to some power."""
        depends = {
            **self.text_depends(),
            "scored": digest(s.scored.numpy().tobytes() for s in self._samples),
            "power": power,
        }
        folder = self._open("gradients", depends)
        gradients.accumulate_gradients(
            self.base, self._samples, power, folder, self._progress, self.world
        )
        return Gradients(self.base, folder, fingerprint(depends))

    def blocks(
        self, name: str, phase: str, rounder: Rounder, depends: Depends
    ) -> QuantizedBlocks:
        """Quantize every linear in order.

        Args:
            name: of the folders in the work folder.
            phase: what it is called while it runs.
            rounder: quantizes a group of linears.
            depends: what its results depend on, beside the model and, where the
                linears' inputs matter, the calibration text.
        """
        known = self.text_depends() if rounder.needs_inputs else self._model_depends
        samples = self._samples if rounder.needs_inputs else []
        folder = self._open(name, {**known, **depends, "report": REPORT_FIELDS})
        blocks = BlockPass(self.base, rounder, samples, folder, self.world)
        return blocks.run(phase, self._progress)

    def text_depends(self) -> Depends:
        """What everything that is measured on the calibration text depends on."""
        tokens = digest(sample.tokens.numpy().tobytes() for sample in self._samples)
        return {**self._model_depends, "tokens": tokens}

    @cached_property
    def _model_depends(self) -> Depends:
        """What every phase depends on."""
        return common_depends(self.base, self.world)

    @cached_property
    def _samples(self) -> list[Sample]:
        return calibrate(
            self.base,
            self.recipe.calibration,
            self._model_depends,
            self._data_root,
            self._workdir,
            self._progress,
            self.world,
        )

    def _open(self, name: str, depends: Depends) -> PhaseFolder:
        """Open the folder of a phase, and note what makes an earlier one useless."""
        with self.world.leader_first():
            changes = self._workdir.differences(name, depends)
            folder = self._workdir.phase(name, depends)
        if changes and folder.is_empty:
            self._progress.note(f"{name}: computed anew: {'; '.join(changes)}")
        return folder


def check_linears(base: BaseModel, group_size: int) -> None:
    """Refuse linears that cannot be cut into groups; call it before any pass.

    Raises:
        QuantizeError: naming the linear, the sizes and the remedy.
    """
    for name, linear in base.linears().items():
        try:
            check_linear_shape(
                name, linear.out_features, linear.in_features, group_size
            )
        except ValueError as error:
            raise QuantizeError(str(error)) from error
