"""One quantizing pass over a model, a decoder block in memory at a time."""

import json
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict
from functools import partial
from time import perf_counter

import psutil
import torch
from torch import Tensor, nn

from tacq_vllm.quantize.blocks import (
    BlockCalls,
    OnGroup,
    batch_windows,
    group_linears,
    run_block,
)
from tacq_vllm.quantize.boundaries import Boundaries
from tacq_vllm.quantize.errors import QuantizeError
from tacq_vllm.quantize.gptq import Hessian, relative_error
from tacq_vllm.quantize.model import BaseModel
from tacq_vllm.quantize.progress import Phase, Progress
from tacq_vllm.quantize.quantized import (
    LinearReport,
    QuantizedBlocks,
    block_file,
)
from tacq_vllm.quantize.rounder import GroupInputs, RoundedLinear, Rounder
from tacq_vllm.quantize.samples import Sample
from tacq_vllm.quantize.workdir import PhaseFolder
from tacq_vllm.quantize.world import World

_BATCH_TOKENS = 4096
"""Tokens that go through a block at once."""

_UNIT_TOKENS = 512
"""Batches of short samples are measured together, until they have so many tokens."""

_MIN_UNITS = 16
"""A short calibration text is cut into so many units, for processes to share."""

_MEMORY_SHARE = 0.25
"""Share of the free memory that batches waiting inside a block may take."""


class BlockPass:
    """Quantizes every linear in order, each on what the quantized ones before produce.

    Args:
        base: the model.
        rounder: quantizes a group of linears.
        samples: calibration tokens; none where inputs do not matter.
        folder: keeps every finished block, and what the next one needs.
        world: shares out the samples.

    Raises:
        QuantizeError: there are more processes than batches of samples.
    """

    def __init__(
        self,
        base: BaseModel,
        rounder: Rounder,
        samples: list[Sample],
        folder: PhaseFolder,
        world: World,
    ) -> None:
        self._base = base
        self._rounder = rounder
        self._folder = folder
        self._world = world
        self._calls = BlockCalls(base)
        self._hidden = Boundaries(folder, "hidden", base.device)
        self._units: list[list[tuple[int, Tensor]]] = []
        self._stride = 0
        if not rounder.needs_inputs:
            return
        total = sum(sample.tokens.numel() for sample in samples)
        # The same units in any number of processes: so are their sums.
        size = min(_BATCH_TOKENS, -(-total // _MIN_UNITS))
        batches = batch_windows([sample.tokens for sample in samples], size)
        units = _join_short(list(enumerate(batches)), min(_UNIT_TOKENS, size))
        if len(units) < world.size:
            raise QuantizeError(
                f"{world.size} processes share {len(units)} batches of calibration "
                "samples: start fewer, or give more text"
            )
        self._units = world.share(units)
        if rounder.sample_tokens:
            self._stride = -(-total // rounder.sample_tokens)

    @property
    def _batches(self) -> list[tuple[int, Tensor]]:
        """This process's batches of tokens [n, seq_len], with their numbers."""
        return [batch for unit in self._units for batch in unit]

    def run(self, phase: str, progress: Progress) -> QuantizedBlocks:
        """Quantize the blocks that are not in the folder yet.

        Raises:
            QuantizeError: a linear cannot be quantized; it is named.
        """
        base = self._base
        left = [i for i in range(len(base.blocks)) if block_file(i) not in self._folder]
        if len(left) < len(base.blocks):
            progress.note(
                f"{phase}: {len(base.blocks) - len(left)} of {len(base.blocks)} "
                "blocks taken from the work folder"
            )
        if left:
            linears = sum(len(base.block_linears(index)) for index in left)
            with progress.phase(phase, linears) as bar, torch.no_grad():
                if self._batches:
                    self._embed(store=left[0] == 0)
                for index in left:
                    self._quantize_block(index, bar)
        self._hidden.sweep()
        return QuantizedBlocks(base, self._rounder, self._folder)

    def _embed(self, *, store: bool) -> None:
        with self._base.resident_outside():
            for number, tokens in self._batches:
                hidden = self._calls.embed(tokens)
                if store:
                    self._hidden.save(0, number, hidden)

    def _quantize_block(self, index: int, bar: Phase) -> None:
        start = perf_counter()
        base = self._base
        reports: list[LinearReport] = []
        tensors: dict[str, Tensor] = {}

        def on_group(group: dict[str, nn.Linear], xs: Iterator[Tensor]) -> None:
            for report, rounded in self._quantize_group(group, xs):
                group[report.name].weight.data = rounded.weight
                for suffix, tensor in rounded.tensors.items():
                    tensors[f"{report.name}.{suffix}"] = tensor
                reports.append(report)
                bar.advance(
                    detail=f"{report.name}  {report.outliers} kept  "
                    f"error {report.error:.2e}"
                )

        with base.resident_block(index) as block:
            if self._batches:
                self._run_block(block, index, on_group)
            else:
                for group in group_linears(base.block_linears(index)):
                    on_group(group, iter(()))
        self._world.wait()
        if self._world.leads:
            notes = {
                "reports": json.dumps([asdict(report) for report in reports]),
                "seconds": str(perf_counter() - start),
            }
            self._folder.save(block_file(index), tensors, notes)
        self._world.wait()
        for number, _ in self._batches:
            self._hidden.remove(index, number)
            if index + 1 == len(base.blocks):
                self._hidden.remove(index + 1, number)

    def _run_block(self, block: nn.Module, index: int, on_group: OnGroup) -> None:
        """Run a block on what is stored of the one before, and store its outputs."""
        linears = self._base.block_linears(index)

        def forward(number: int) -> Tensor:
            return self._calls.run(block, index, self._hidden.load(index, number))

        outputs = run_block(
            [partial(forward, number) for number, _ in self._batches],
            group_linears(linears),
            self._batches_in_memory(linears),
            on_group,
        )
        with closing(outputs):
            for (number, _), output in zip(self._batches, outputs, strict=True):
                self._hidden.save(index + 1, number, output)

    def _batches_in_memory(self, linears: dict[str, nn.Linear]) -> int:
        if self._base.device.type == "cuda":
            free = torch.cuda.mem_get_info(self._base.device)[0]
        else:
            free = psutil.virtual_memory().available // self._world.size
        features = sum(m.in_features + m.out_features for m in linears.values())
        tokens = max(batch.numel() for _, batch in self._batches)
        batch_bytes = features * tokens * torch.float32.itemsize
        return int(_MEMORY_SHARE * free / batch_bytes)

    def _quantize_group(
        self, group: dict[str, nn.Linear], xs: Iterator[Tensor]
    ) -> list[tuple[LinearReport, RoundedLinear]]:
        """Quantize linears that share their input."""
        weights = {name: linear.weight.data for name, linear in group.items()}
        inputs = self._measure(xs) if self._batches else None
        try:
            rounded = self._rounder.round_group(weights, inputs)
        except QuantizeError as error:
            raise QuantizeError(f"{', '.join(group)}: {error}") from error
        return [
            (self._report(name, W, rounded[name], inputs), rounded[name])
            for name, W in weights.items()
        ]

    def _measure(self, xs: Iterator[Tensor]) -> GroupInputs:
        """Go through a group's inputs once."""
        hessian: Hessian | None = None
        sample: list[Tensor] = []
        for unit in self._units:
            x = torch.cat([next(xs).flatten(0, -2) for _ in unit])
            hessian = hessian or Hessian(x.shape[-1], x.device)
            hessian.add(x)
            if self._stride:
                # A copy: a view would keep all inputs in memory.
                chosen = x[:: self._stride].to(torch.float32, copy=True)
                sample.append(chosen)
        assert hessian is not None
        self._world.add_up(hessian.total)
        self._world.add_up(hessian.tokens)
        H = hessian.mean()
        return GroupInputs(H, torch.cat(sample) if sample else H.new_empty(0, len(H)))

    def _report(
        self, name: str, W: Tensor, rounded: RoundedLinear, inputs: GroupInputs | None
    ) -> LinearReport:
        return LinearReport(
            name=name,
            bits=self._rounder.bits,
            group_size=self._rounder.group_size,
            outliers=rounded.outliers,
            stored_bytes=rounded.stored_bytes,
            error=relative_error(W, rounded.weight, inputs.H if inputs else None),
            damp_percent=rounded.damp_percent,
        )


def _join_short(
    batches: list[tuple[int, Tensor]], tokens: int
) -> list[list[tuple[int, Tensor]]]:
    """Join neighbouring batches until they have so many tokens."""
    units: list[list[tuple[int, Tensor]]] = []
    missing = 0
    for number, batch in batches:
        if missing <= 0:
            units.append([])
            missing = tokens
        units[-1].append((number, batch))
        missing -= batch.numel()
    return units
