"""What the 16-bit model's head is given for each token, computed once, on disk.

One decoder block is in memory at a time. So training needs no second model in memory.
"""

from time import perf_counter

import torch
from accelerate import Accelerator
from torch import Tensor

from tacq_vllm.quantize.blocks import BlockCalls
from tacq_vllm.quantize.boundaries import Boundaries
from tacq_vllm.quantize.model import BaseModel
from tacq_vllm.quantize.progress import Progress
from tacq_vllm.quantize.samples import Sample
from tacq_vllm.quantize.workdir import PhaseFolder
from tacq_vllm.quantize.world import World

PHASE = "teacher"
_DONE = "done"


class Teacher:
    """The 16-bit model's states of samples, bfloat16 [n, hidden], in a folder."""

    def __init__(self, folder: PhaseFolder) -> None:
        self._folder = folder

    def states(self, number: int) -> Tensor:
        """The states of a sample, bfloat16 [n, hidden], mapped from their file."""
        return self._folder.load_tensor(_states(number), "states")

    @property
    def seconds(self) -> float:
        """What computing them took."""
        return float(self._folder.notes(_DONE)["seconds"])


@torch.no_grad()
def run_teacher(
    base: BaseModel,
    samples: list[Sample],
    folder: PhaseFolder,
    accelerator: Accelerator,
    progress: Progress,
    world: World,
) -> Teacher:
    """Compute the states that are not in the folder yet, in accelerator's precision."""
    if _DONE in folder:
        progress.note(f"{PHASE}: taken from the work folder")
        return Teacher(folder)
    start = perf_counter()
    last = len(base.blocks)
    own = world.share(range(len(samples)))
    calls = BlockCalls(base)
    stored = Boundaries(folder, "hidden", base.device)

    def started(number: int) -> bool:
        return _states(number) in folder or any(
            stored.has(index, number) for index in range(last + 1)
        )

    with progress.phase(PHASE, last) as bar:
        with base.resident_outside():
            for number in own:
                hidden = calls.embed(samples[number].tokens.unsqueeze(0))
                if not started(number):
                    stored.save(0, number, hidden)
        for index in range(last):
            with base.resident_block(index) as block:
                for number in own:
                    if stored.has(index, number):
                        hidden = stored.load(index, number)
                        with accelerator.autocast():
                            output = calls.run(block, index, hidden)
                        stored.save(index + 1, number, output)
                        stored.remove(index, number)
            bar.advance(detail=base.block_name(index))
        with base.resident_outside():
            for number in own:
                if stored.has(last, number):
                    states = calls.states(stored.load(last, number))[0]
                    folder.save(_states(number), {"states": states.bfloat16()})
                    stored.remove(last, number)
    world.wait()
    if world.leads:
        folder.save(_DONE, {}, {"seconds": str(perf_counter() - start)})
    world.wait()
    return Teacher(folder)


def _states(sample: int) -> str:
    return f"states-{sample:06d}"
