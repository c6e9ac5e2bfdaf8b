"""How long a training lasts, and how its learning rates go meanwhile."""

import math
from collections.abc import Sequence
from time import perf_counter

import torch

from tacq_vllm.quantize.world import World
from tacq_vllm.recover.batches import count_steps
from tacq_vllm.recover.config import RecoverConfig
from tacq_vllm.recover.state import Record


class Budget:
    """What may be spent: steps, or seconds.

    Args:
        config: the budget and its unit.
        lengths: tokens of each sample that is trained on.
    """

    def __init__(self, config: RecoverConfig, lengths: Sequence[int]) -> None:
        self._is_time = config.budget_unit == "minutes"
        match config.budget_unit:
            case "steps":
                self.limit = config.budget
            case "minutes":
                self.limit = 60 * config.budget
            case "epochs":
                self.limit = count_steps(
                    lengths, config.batch_tokens, config.seed, config.budget
                )

    def spent(self, record: Record) -> float:
        """What was spent when a step was made."""
        return record.seconds if self._is_time else record.step


class Clock:
    """Seconds of a run, its earlier parts included; the same in all processes.

    Args:
        world: the processes.
        device: where they add up.
        before: seconds of the earlier parts.
    """

    def __init__(self, world: World, device: torch.device, before: float) -> None:
        self._world = world
        self._device = device
        self._start = perf_counter() - before

    def seconds(self) -> float:
        """The leading process's time."""
        own = perf_counter() - self._start if self._world.leads else 0.0
        seconds = torch.tensor(own, dtype=torch.float64, device=self._device)
        self._world.add_up(seconds)
        return float(seconds)


def learning_rate(share: float, config: RecoverConfig) -> float:
    """Share of the highest learning rate when a share of the budget is spent."""
    if share < config.warmup:
        # A first step at rate 0 would be lost.
        return max(share / config.warmup, 0.1)
    along = (share - config.warmup) / (1 - config.warmup)
    cosine = (1 + math.cos(math.pi * min(along, 1.0))) / 2
    return config.final_lr + (1 - config.final_lr) * cosine
