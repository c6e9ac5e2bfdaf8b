"""Walking decoder blocks: how the model calls them, and the inputs of their linears.

The samples go through a block together: each one's forward pass is a coroutine that
stops where a group of linears is about to run. When all have stopped there, the group
is quantized, and the passes go on with the quantized weights. So every linear sees what
the quantized linears before it really produce (true-sequential GPTQ), and runs once a
sample; samples whose stopped passes do not fit into memory start anew for each group,
which changes the time and not the result.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import Tensor, nn

from tacq_vllm.format.parallel import fused_modules
from tacq_vllm.quantize.errors import QuantizeError
from tacq_vllm.quantize.model import BaseModel

OnGroup = Callable[[dict[str, nn.Linear], Iterator[Tensor]], None]
"""Called with a group and its inputs, one per batch."""


class BlockCalls:
    """The model around its decoder blocks, which are called one by one."""

    def __init__(self, base: BaseModel) -> None:
        self._base = base
        self._keywords: dict[torch.Size, list[dict[str, Any]]] = {}

    def embed(self, tokens: Tensor) -> Tensor:
        """What the first block is given for tokens [batch, n]: [batch, n, hidden].

        What lies outside the blocks must be resident. The keyword arguments of all
        blocks (masks, position embeddings), which depend on the shape of the tokens
        alone, are remembered for `run`.

        Raises:
            QuantizeError: the model calls its blocks in a way that is not supported.
        """
        keywords: list[dict[str, Any]] = []
        first: list[Tensor] = []

        def record(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if args:
                raise QuantizeError(
                    "the model calls its decoder blocks with positional arguments: "
                    f"{type(self._base.model).__name__} is not supported"
                )
            keywords.append(kwargs)
            first[:] = first or [hidden]
            return hidden

        with _replaced_blocks(self._base, record):
            decoder = self._base.model.get_decoder()
            decoder(tokens.to(self._base.device), use_cache=False)
        self._keywords[tokens.shape] = keywords
        return first[0]

    def run(self, block: nn.Module, index: int, hidden: Tensor) -> Tensor:
        """Run a block, which is resident, on [batch, n, hidden]."""
        keywords = self._keywords[hidden.shape[:2]][index]
        output = block(hidden, **keywords)
        states: Tensor = output[0] if isinstance(output, tuple) else output
        return states

    def states(self, hidden: Tensor) -> Tensor:
        """What the decoder makes of its last block's output: [batch, n, hidden].

        What lies outside the blocks must be resident.
        """
        tokens = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=hidden.device)
        with _replaced_blocks(self._base, lambda *args, **kwargs: hidden):
            decoder = self._base.model.get_decoder()
            states: Tensor = decoder(tokens, use_cache=False).last_hidden_state
        return states

    def logits(self, hidden: Tensor) -> Tensor:
        """What the model makes of its last block's output: [batch, n, vocabulary].

        What lies outside the blocks must be resident.
        """
        tokens = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=hidden.device)
        with _replaced_blocks(self._base, lambda *args, **kwargs: hidden):
            logits: Tensor = self._base.model(tokens, use_cache=False).logits
        return logits


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


def group_linears(linears: dict[str, nn.Linear]) -> list[dict[str, nn.Linear]]:
    """Split a block's linears into groups that share their input, as fused ones do."""
    return [{name: linears[name] for name in names} for names in fused_modules(linears)]


def run_block(
    forwards: Sequence[Callable[[], Tensor]],
    groups: list[dict[str, nn.Linear]],
    in_memory: int,
    on_group: OnGroup,
) -> Generator[Tensor]:
    """Run one block on all batches, stopping before each group of linears.

    Closing the generator leaves the linears without hooks.

    Args:
        forwards: one per batch: runs the block on it.
        groups: linears that share their input.
        in_memory: how many batches may wait in memory where they have stopped; the
            others start anew.
        on_group: called with a group and its inputs, one per batch, to be iterated to
            the end; may change the linears' weights afterwards.

    Yields:
        The block's output for each batch, [n, seq_len, hidden], in order.

    Raises:
        QuantizeError: batches reach the groups in different orders.
    """
    main = getcurrent()
    group_of: dict[nn.Module, int] = {
        linear: n for n, group in enumerate(groups) for linear in group.values()
    }
    waiting: dict[int, greenlet] = {}

    def stop(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        task, number = getcurrent(), group_of[module]
        if number not in task.seen:
            task.seen.append(number)
            main.switch(args[0])

    def reach(index: int, stops: int) -> tuple[int | None, Tensor]:
        """Run a batch to its next stop: the group, None at the end, and a tensor."""
        task = waiting.pop(index, None)
        if task is None:
            task = greenlet(forwards[index])
            task.seen = []
            for _ in range(stops):
                task.switch()
        tensor = task.switch()
        if task.dead:
            return None, tensor
        number = task.seen[-1]
        if index < in_memory:
            waiting[index] = task
        else:
            task.throw(GreenletExit)
        return number, tensor

    def inputs(first: Tensor, number: int, stops: int) -> Iterator[Tensor]:
        yield first
        for index in range(1, len(forwards)):
            other, x = reach(index, stops)
            if other != number:
                raise QuantizeError(
                    "samples reach a block's linears in different orders"
                )
            yield x

    hooks = [module.register_forward_pre_hook(stop) for module in group_of]
    try:
        for stops in count():
            number, tensor = reach(0, stops)
            if number is None:
                break
            on_group(groups[number], inputs(tensor, number, stops))
        yield tensor
        for index in range(1, len(forwards)):
            yield reach(index, stops)[1]
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _replaced_blocks(base: BaseModel, forward: Callable[..., Tensor]) -> Iterator[None]:
    blocks = base.blocks
    for block in blocks:
        block.forward = forward
    try:
        yield
    finally:
        for block in blocks:
            del block.forward
