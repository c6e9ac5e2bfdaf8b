"""Gradients of the 16-bit model, one decoder block in memory at a time.

Forward, each sample's input of every block goes to disk; backward, a block runs again
on it and hands the gradient on to the block before (activation checkpointing, with the
disk for a store).
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

from tacq_vllm.quantize.blocks import BlockCalls
from tacq_vllm.quantize.boundaries import Boundaries
from tacq_vllm.quantize.errors import QuantizeError
from tacq_vllm.quantize.model import BaseModel
from tacq_vllm.quantize.progress import Phase, Progress
from tacq_vllm.quantize.samples import Sample
from tacq_vllm.quantize.workdir import PhaseFolder
from tacq_vllm.quantize.world import World

PHASE = "gradients"

_HEAD_TOKENS = 512
"""Tokens whose logits are in memory at a time: a sample's would be the largest tensor
of the run."""


def accumulate_gradients(
    base: BaseModel,
    samples: list[Sample],
    power: int,
    folder: PhaseFolder,
    progress: Progress,
    world: World,
) -> None:
    """Sum |∂L/∂W|**power over samples for every quantized linear.

    One backward pass a sample, L being the mean cross-entropy over the tokens that it
    scores, in float32. The sums, float32 [out, in], are stored by `linear` in
    `folder`; what an earlier run has stored there is not computed again.

    Raises:
        QuantizeError: a gradient is not finite.
    """
    _GradientPass(base, samples, power, folder, world).run(progress)


def load_gradient(base: BaseModel, folder: PhaseFolder, linear: str) -> Tensor:
    """The stored sum of one linear: float32 [out, in] on the model's device."""
    return folder.load_tensor(_sums(base.block_of(linear)), linear).to(base.device)


class _GradientPass:
    def __init__(
        self,
        base: BaseModel,
        samples: list[Sample],
        power: int,
        folder: PhaseFolder,
        world: World,
    ) -> None:
        self._base = base
        self._samples = samples
        self._power = power
        self._folder = folder
        self._world = world
        self._own = world.share(range(len(samples)))
        self._calls = BlockCalls(base)
        self._hidden = Boundaries(folder, "hidden", base.device)
        self._gradients = Boundaries(folder, "gradient", base.device)

    def run(self, progress: Progress) -> None:
        count = len(self._base.blocks)
        backward = [i for i in range(count) if _sums(i) not in self._folder]
        if backward:
            self._run(backward, progress)
        else:
            progress.note(f"{PHASE}: taken from the work folder")
        self._hidden.sweep()
        self._gradients.sweep()

    def _run(self, backward: list[int], progress: Progress) -> None:
        count = len(self._base.blocks)
        forward = [i for i in range(count) if _passed(i) not in self._folder]
        if "head" in self._folder:
            forward = []
        if len(forward) + len(backward) < 2 * count:
            progress.note(
                f"{PHASE}: {2 * count - len(forward) - len(backward)} of {2 * count} "
                "steps taken from the work folder"
            )
        steps = len(forward) + len(backward)
        with progress.phase(PHASE, steps) as bar, torch.no_grad():
            self._embed()
            for index in forward:
                self._forward(index)
                bar.advance(detail=f"{self._base.block_name(index)} forward")
            if "head" not in self._folder:
                self._head()
            for index in reversed(backward):
                self._backward(index, bar)

    def _embed(self) -> None:
        with self._base.resident_outside():
            for number in self._own:
                hidden = self._calls.embed(self._samples[number].tokens.unsqueeze(0))
                if _passed(0) not in self._folder and "head" not in self._folder:
                    self._hidden.save(0, number, hidden)

    def _forward(self, index: int) -> None:
        with self._base.resident_block(index) as block:
            for number in self._own:
                hidden = self._hidden.load(index, number)
                output = self._calls.run(block, index, hidden)
                self._hidden.save(index + 1, number, output)
        self._commit(_passed(index), {})

    def _head(self) -> None:
        last = len(self._base.blocks)
        with self._base.resident_outside(), torch.enable_grad():
            for number in self._own:
                sample = self._samples[number]
                hidden = self._hidden.load(last, number).requires_grad_()
                # The last token is to predict nothing.
                targets = pad(sample.targets(), (0, 1), value=Sample.UNSCORED)
                count = int((targets != Sample.UNSCORED).sum())
                parts = hidden.split(_HEAD_TOKENS, dim=1)
                for part, wanted in zip(
                    parts, targets.split(_HEAD_TOKENS), strict=True
                ):
                    (self._loss(part, wanted) / count).backward()
                assert hidden.grad is not None
                self._gradients.save(last, number, hidden.grad)
        self._commit("head", {})
        for number in self._own:
            self._hidden.remove(last, number)

    def _loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy summed over the tokens of [1, n, hidden] that are scored."""
        logits = self._calls.logits(hidden)[0].float()
        return cross_entropy(
            logits,
            targets.to(logits.device),
            ignore_index=Sample.UNSCORED,
            reduction="sum",
        )

    def _backward(self, index: int, bar: Phase) -> None:
        base = self._base
        with base.resident_block(index) as block, torch.enable_grad():
            linears = base.block_linears(index)
            # In float64 the order of additions, and so the number of processes, is no
            # matter.
            sums = {
                name: torch.zeros_like(linear.weight, dtype=torch.float64)
                for name, linear in linears.items()
            }
            for linear in linears.values():
                linear.weight.requires_grad_(True)
            for number in self._own:
                hidden = self._hidden.load(index, number).requires_grad_()
                output = self._calls.run(block, index, hidden)
                output.backward(self._gradients.load(index + 1, number))
                for name, linear in linears.items():
                    _add_power(sums[name], linear, self._power)
                assert hidden.grad is not None
                if index > 0:
                    self._gradients.save(index, number, hidden.grad)
        for name, total in sums.items():
            self._world.add_up(total)
            sums[name] = total.to(torch.float32)
            if not bool(sums[name].isfinite().all()):
                raise QuantizeError(f"{name}: a gradient is not finite")
        self._commit(_sums(index), sums)
        for number in self._own:
            self._gradients.remove(index + 1, number)
            self._hidden.remove(index, number)
        bar.advance(detail=f"{base.block_name(index)} backward")

    def _commit(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Store what all processes have done together, when they have."""
        self._world.wait()
        if self._world.leads:
            self._folder.save(name, tensors)
        self._world.wait()


def _add_power(total: Tensor, linear: nn.Linear, power: int) -> None:
    gradient = linear.weight.grad
    assert gradient is not None
    gradient.abs_()
    total.add_(gradient if power == 1 else gradient.pow_(power))
    linear.weight.grad = None


def _sums(index: int) -> str:
    return f"sums-{index:04d}"


def _passed(index: int) -> str:
    return f"passed-{index:04d}"
