"""A pass of GPTQ over the blocks of a small model."""

import torch

from tacq_vllm.config import Recipe
from tacq_vllm.quantize.layerwise import BlockPass
from tacq_vllm.quantize.methods.gptq import gptq_rounder
from tacq_vllm.quantize.methods.packed import Masks, keep_none
from tacq_vllm.quantize.model import BaseModel
from tacq_vllm.quantize.progress import Progress
from tacq_vllm.quantize.quantized import QuantizedBlocks
from tacq_vllm.quantize.samples import Sample
from tacq_vllm.quantize.workdir import PhaseFolder
from tacq_vllm.quantize.world import World
from tests.conftest import Recorder, random_samples

LENGTHS = (30, 30, 12, 30, 5, 5)
"""Of the samples, in tokens."""


def quantize(
    base: BaseModel,
    recipe: Recipe,
    folder: PhaseFolder,
    *,
    samples: list[Sample] | None = None,
    masks: Masks = keep_none,
    listener: Recorder | None = None,
) -> QuantizedBlocks:
    samples = samples or random_samples(*LENGTHS)
    rounder = gptq_rounder(recipe, torch.bfloat16, masks, World())
    blocks = BlockPass(base, rounder, samples, folder, World())
    return blocks.run("gptq", Progress(listener))


def names(folder: PhaseFolder) -> set[str]:
    return {path.stem for path in folder.folder.glob("*.safetensors")}
