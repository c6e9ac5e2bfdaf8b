"""The training loop: steps, looks at the held-out loss, and where to go on."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import islice

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs

from tacq_vllm.quantize.errors import QuantizeError
from tacq_vllm.quantize.progress import Progress
from tacq_vllm.quantize.samples import Sample
from tacq_vllm.quantize.world import World
from tacq_vllm.recover.batches import (
    Batch,
    hold_out,
    plan_steps,
    split_step,
    stack_samples,
)
from tacq_vllm.recover.budget import Budget, Clock, learning_rate
from tacq_vllm.recover.config import Precision, RecoverConfig
from tacq_vllm.recover.state import History, Record, StateFolder
from tacq_vllm.recover.student import Student
from tacq_vllm.recover.teacher import Teacher

PHASE = "training"

_BETAS = (0.9, 0.99)


@contextmanager
def open_accelerator(
    precision: Precision, device: torch.device
) -> Iterator[Accelerator]:
    """Open what places the model, casts its products and adds up gradients."""
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" or _cpu_has_bf16() else "fp32"
    # Every buffer is the same in all processes, and stays so.
    handler = DistributedDataParallelKwargs(broadcast_buffers=False)
    accelerator = Accelerator(
        cpu=device.type == "cpu",
        mixed_precision="bf16" if precision == "bf16" else "no",
        kwargs_handlers=[handler],
    )
    try:
        yield accelerator
    finally:
        # It is the process's: the next run may want another precision.
        AcceleratorState._reset_state(reset_partial_state=True)


class Trainer:
    """Trains a student on samples.

    Args:
        student: the model; its trained values are changed in place.
        samples: in random order; some of them are held out.
        teacher: the 16-bit model's states of those that are not; None: no divergence.
        config: how.
        accelerator: where, and in which precision.
        folder: keeps where training stands.
        world: the processes that share each step's samples.
        spent: seconds of the budget that are gone.
    """

    def __init__(
        self,
        student: Student,
        samples: Sequence[Sample],
        teacher: Teacher | None,
        config: RecoverConfig,
        accelerator: Accelerator,
        folder: StateFolder,
        world: World,
        spent: float,
    ) -> None:
        self._student = student
        self._samples = samples
        self._teacher = teacher
        self._config = config
        self._accelerator = accelerator
        self._folder = folder
        self._world = world
        self._spent = spent
        self._lengths = [sample.tokens.numel() for sample in samples]
        self._train, self._held_out = hold_out(len(samples), config.held_out)
        self._model = accelerator.prepare(student)
        self._optimizer = torch.optim.Adam(self._groups(), betas=_BETAS)

    def run(self, progress: Progress) -> History:
        """Train until the budget is spent, or the held-out loss gets no better.

        The student has its best values then.

        Raises:
            QuantizeError: a step has fewer samples than there are processes, or a
                loss is not finite.
        """
        trained = self._student.trained_state()
        history = self._folder.load(trained, self._optimizer)
        if not history.records:
            record = Record(0, self._spent, held_out=self._look())
            history = self._save(History((record,)))
        elif not history.finished:
            progress.note(f"{PHASE}: goes on from step {history.last.step}")
        if not history.finished:
            history = self._steps(history, progress)
        self._student.load_trained(self._folder.best(history))
        progress.note(f"{PHASE}: {_outcome(history)}")
        return history

    def _steps(self, history: History, progress: Progress) -> History:
        config = self._config
        device = self._accelerator.device
        clock = Clock(self._world, device, history.last.seconds)
        lengths = [self._lengths[number] for number in self._train]
        plan = plan_steps(lengths, config.batch_tokens, config.seed)
        budget = Budget(config, lengths)
        before = budget.spent(history.last)
        left = max(1, math.ceil(budget.limit - before))
        with progress.phase(PHASE, left) as bar:
            told = 0
            for step in islice(plan, history.last.step, None):
                spent = budget.spent(history.last)
                if spent >= budget.limit or self._stops(history):
                    break
                record = self._step(step, spent / budget.limit, history.last)
                record = replace(record, seconds=clock.seconds())
                history = history.add(record)
                if record.step % config.evaluate_every == 0:
                    history = self._look_and_save(history, clock)
                done = min(left, int(budget.spent(history.last) - before))
                if done > told:
                    bar.advance(done - told, _line(history))
                    told = done
            if math.isnan(history.last.held_out):
                history = self._look_and_save(history, clock)
            history = self._save(replace(history, finished=True))
            if told < left:
                bar.advance(left - told, _line(history))
        return history

    def _stops(self, history: History) -> bool:
        return history.looks_since_best >= self._config.patience

    def _step(self, step: list[int], share: float, before: Record) -> Record:
        if len(step) < self._world.size:
            raise QuantizeError(
                f"{self._world.size} processes share a step of {len(step)} samples: "
                "raise batch_tokens, or start fewer"
            )
        for group in self._optimizer.param_groups:
            group["lr"] = group["highest"] * learning_rate(share, self._config)
        scored = self._scored(step)
        batches = split_step(
            self._world.share(step), self._lengths, self._config.micro_tokens
        )
        sums = torch.zeros(2, device=self._accelerator.device)
        for index, numbers in enumerate(batches):
            is_last = index + 1 == len(batches)
            # Gradients are added up over the processes once a step.
            waits = self._accelerator.no_sync(self._model)
            with nullcontext() if is_last else waits:
                losses = self._model(self._batch(numbers), self._config.distill)
                # Processes' gradients are averaged.
                self._accelerator.backward(losses.total * self._world.size / scored)
            sums += torch.stack([losses.total.detach(), losses.text])
        self._world.add_up(sums)
        loss, text_loss = (sums / scored).tolist()
        number = before.step + 1
        if not math.isfinite(loss):
            raise QuantizeError(
                f"the loss of step {number} is not finite: lower the learning rates"
            )
        self._accelerator.clip_grad_norm_(
            self._student.trained_state().values(), self._config.clip_norm
        )
        self._optimizer.step()
        self._optimizer.zero_grad()
        tokens = before.tokens + sum(self._lengths[n] for n in step)
        return Record(number, before.seconds, tokens, loss, text_loss)

    @torch.no_grad()
    def _look(self) -> float:
        """The mean loss of the held-out samples."""
        numbers = self._held_out
        sums = torch.zeros(1, device=self._accelerator.device)
        own = self._world.share(numbers)
        for part in split_step(own, self._lengths, self._config.micro_tokens):
            batch = stack_samples(
                [self._samples[n] for n in part], None, self._accelerator.device
            )
            with self._accelerator.autocast():
                sums += self._student(batch, 0.0).text
        self._world.add_up(sums)
        return float(sums) / self._scored(numbers)

    def _look_and_save(self, history: History, clock: Clock) -> History:
        last = replace(history.last, held_out=self._look(), seconds=clock.seconds())
        return self._save(replace(history, records=(*history.records[:-1], last)))

    def _save(self, history: History) -> History:
        self._world.wait()
        if self._world.leads:
            trained = self._student.trained_state()
            self._folder.save(trained, self._optimizer, history)
        self._world.wait()
        return history

    def _scored(self, numbers: Sequence[int]) -> int:
        return sum(int(self._samples[n].scored[1:].sum()) for n in numbers)

    def _batch(self, numbers: list[int]) -> Batch:
        states = None
        if self._teacher is not None:
            states = [self._teacher.states(number) for number in numbers]
        samples = [self._samples[number] for number in numbers]
        return stack_samples(samples, states, self._accelerator.device)

    def _groups(self) -> list[dict[str, object]]:
        config = self._config
        highest = {
            "magnitude": config.magnitude_lr,
            "A": config.lora_lr,
            "B": config.lora_lr,
            "kept": config.outlier_lr,
        }
        trained = self._student.trained_state()
        return [
            {
                "params": [p for n, p in trained.items() if n.endswith(f".{leaf}")],
                "lr": rate,
                "highest": rate,
            }
            for leaf, rate in highest.items()
        ]


def _cpu_has_bf16() -> bool:
    """Whether the CPU multiplies in bf16, so that it is faster than in float32."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def _line(history: History) -> str:
    last = history.last
    look = history.looks[-1]
    return (
        f"step {last.step}  loss {last.loss:.4f}  "
        f"held-out {look.held_out:.4f} (step {look.step})"
    )


def _outcome(history: History) -> str:
    """Which step's values are taken, and what they are worth."""
    first, best, last = history.records[0], history.best, history.last
    if last.step == 0:
        return "no step was made: the 16-bit model's pass took the budget; raise it"
    before = f"the held-out loss of {first.held_out:.4f}"
    if best.step == 0:
        return f"none of {last.step} steps is better than {before}: all values stay"
    return f"step {best.step} is taken: from {before} to {best.held_out:.4f}"
