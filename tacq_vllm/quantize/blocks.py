"""Walking decoder blocks: inputs of a block, and of each linear inside it.

The samples go through a block together: each one's forward pass is a coroutine that
stops where a group of linears is about to run. When all have stopped there, the group
is quantized, and the passes go on with the quantized weights. So every linear runs
once a sample, and sees what the quantized linears before it really produce
(true-sequential GPTQ).
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from tacq_vllm.quantize.errors import QuantizeError
from tacq_vllm.quantize.model import BaseModel

FUSED_GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Linears that share their input, and that serving engines fuse into one."""


@dataclass
class BlockInputs:
    """What one batch of samples brings to the decoder blocks."""

    hidden_states: Tensor
    """[batch, seq_len, hidden]; replaced by each block's output."""
    keywords: list[dict[str, Any]]
    """Keyword arguments of each block: masks, position embeddings."""


def batch_windows(windows: Sequence[Tensor], tokens: int) -> list[Tensor]:
    """Stack neighbours of equal length into batches [n, seq_len] of about `tokens`."""
    batches: list[list[Tensor]] = []
    for window in windows:
        fits = (
            batches
            and batches[-1][0].numel() == window.numel()
            and (len(batches[-1]) + 1) * window.numel() <= tokens
        )
        if fits:
            batches[-1].append(window)
        else:
            batches.append([window])
    return [torch.stack(batch) for batch in batches]


def capture_inputs(base: BaseModel, batches: Iterable[Tensor]) -> list[BlockInputs]:
    """Run what lies before the blocks, and record what each block would be called with.

    The blocks themselves do not run: each hands its input on.
    """
    captured = []
    blocks = base.blocks
    for tokens in batches:
        keywords: list[dict[str, Any]] = []
        first: list[Tensor] = []

        def record(
            hidden_states: Tensor,
            *args: Any,
            keywords: list[dict[str, Any]] = keywords,
            first: list[Tensor] = first,
            **kwargs: Any,
        ) -> Tensor:
            if args:
                raise QuantizeError(
                    "the model calls its decoder blocks with positional arguments: "
                    f"{type(base.model).__name__} is not supported"
                )
            keywords.append(kwargs)
            first[:] = first or [hidden_states]
            return hidden_states

        for block in blocks:
            block.forward = record
        try:
            decoder = base.model.get_decoder()
            decoder(tokens.to(base.model.device), use_cache=False)
        finally:
            for block in blocks:
                del block.forward
        captured.append(BlockInputs(first[0], keywords))
    return captured


def group_linears(linears: dict[str, nn.Linear]) -> list[dict[str, nn.Linear]]:
    """Split a block's linears into groups that share their input."""
    groups: dict[tuple[str, ...], dict[str, nn.Linear]] = {}
    for name, linear in linears.items():
        parent, _, leaf = name.rpartition(".")
        fused = next((group for group in FUSED_GROUPS if leaf in group), (leaf,))
        groups.setdefault((parent, *fused), {})[name] = linear
    return list(groups.values())


def run_block(
    block: nn.Module,
    index: int,
    inputs: Sequence[BlockInputs],
    groups: list[dict[str, nn.Linear]],
    on_group: Callable[[dict[str, nn.Linear], list[Tensor]], None],
) -> None:
    """Run one block on all samples, stopping before each group of linears.

    Args:
        block: the decoder block.
        index: its number, which picks its keyword arguments.
        inputs: hidden states, replaced by the block's outputs.
        groups: linears that share their input.
        on_group: called with a group and its inputs, one per batch of samples; may
            change the linears' weights.
    """
    main = getcurrent()
    group_of: dict[nn.Module, int] = {
        linear: number
        for number, group in enumerate(groups)
        for linear in group.values()
    }

    def stop(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        task = getcurrent()
        number = group_of[module]
        if number not in task.stopped:
            task.stopped.add(number)
            main.switch((number, args[0]))

    tasks = []
    for _ in inputs:
        task = greenlet(block)
        task.stopped = set()
        tasks.append(task)
    hooks = [module.register_forward_pre_hook(stop) for module in group_of]
    try:
        results = [
            task.switch(batch.hidden_states, **batch.keywords[index])
            for task, batch in zip(tasks, inputs, strict=True)
        ]
        while not tasks[0].dead:
            numbers = {number for number, _ in results}
            if len(numbers) != 1:
                raise QuantizeError(
                    "samples reach a block's linears in different orders"
                )
            on_group(groups[numbers.pop()], [x for _, x in results])
            results = [task.switch() for task in tasks]
    finally:
        for hook in hooks:
            hook.remove()
    for batch, output in zip(inputs, results, strict=True):
        batch.hidden_states = output[0] if isinstance(output, tuple) else output
