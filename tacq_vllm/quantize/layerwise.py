"""One GPTQ pass over a model, a decoder block in memory at a time."""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from time import perf_counter

import psutil
import torch
from torch import Tensor, nn

from tacq_vllm.config import Recipe
from tacq_vllm.format.linear import PackedLinear
from tacq_vllm.format.schema import storage_dtype
from tacq_vllm.kernels.reference import dequantize
from tacq_vllm.quantize.blocks import (
    BlockCalls,
    batch_windows,
    group_linears,
    run_block,
)
from tacq_vllm.quantize.errors import QuantizeError
from tacq_vllm.quantize.gptq import (
    GptqResult,
    Hessian,
    quantize_matrix,
    relative_error,
)
from tacq_vllm.quantize.model import BaseModel
from tacq_vllm.quantize.progress import Phase, Progress
from tacq_vllm.quantize.samples import Sample
from tacq_vllm.quantize.workdir import PhaseFolder
from tacq_vllm.quantize.world import World

_BATCH_TOKENS = 4096
"""Tokens that go through a block at once."""

_MIN_BATCHES = 16
"""Into which a short calibration text is cut, so that processes can share it."""

_MEMORY_SHARE = 0.25
"""Of the free memory, for batches that wait inside a block."""

Masks = Callable[[str], Tensor | None]
"""The weights that a linear keeps, bool [out, in], or None."""


@dataclass(frozen=True)
class LinearReport:
    """What quantizing one linear gave."""

    name: str
    bits: int
    group_size: int
    outliers: int
    error: float
    """Squared output error over squared output, on the calibration text."""
    damp_percent: float


class QuantizedBlocks:
    """The stored result of a pass."""

    def __init__(self, base: BaseModel, bits: int, folder: PhaseFolder) -> None:
        self._base = base
        self._bits = bits
        self._folder = folder

    def packed(self, linear: str) -> PackedLinear:
        """The tensors of one linear, mapped from their file."""
        prefix = f"{linear}."
        stored = self._folder.load(_block(self._base.block_of(linear)), prefix)
        tensors = {name.removeprefix(prefix): t for name, t in stored.items()}
        in_features = self._base.linears()[linear].in_features
        return PackedLinear.from_tensors(tensors, self._bits, in_features)

    def weight(self, linear: str) -> Tensor:
        """What a linear's tensors stand for: float32 [out, in] on the device."""
        return dequantize(self.packed(linear)).to(self._base.device)

    def reports(self) -> Iterator[LinearReport]:
        """The report of every linear, in order."""
        for notes in self._notes():
            for fields in json.loads(notes["reports"]):
                yield LinearReport(**fields)

    def seconds(self) -> list[float]:
        """Wall time of each block."""
        return [float(notes["seconds"]) for notes in self._notes()]

    def _notes(self) -> Iterator[dict[str, str]]:
        for index in range(len(self._base.blocks)):
            yield self._folder.notes(_block(index))


class GptqPass:
    """Quantizes every linear in order, each on what the quantized ones before produce.

    Args:
        base: the model.
        recipe: bits, group size, GPTQ settings.
        samples: calibration tokens.
        masks: the weights that each linear keeps.
        folder: keeps every finished block, and what the next one needs.
        world: shares out the samples, and the rows of each matrix.
    """

    def __init__(
        self,
        base: BaseModel,
        recipe: Recipe,
        samples: list[Sample],
        masks: Masks,
        folder: PhaseFolder,
        world: World,
    ) -> None:
        self._base = base
        self._recipe = recipe
        self._masks = masks
        self._folder = folder
        self._world = world
        self._dtype = storage_dtype(base.storage_dtype(recipe.export.dtype))
        total = sum(sample.tokens.numel() for sample in samples)
        # The same batches in any number of processes: so are their sums.
        size = min(_BATCH_TOKENS, -(-total // _MIN_BATCHES))
        batches = batch_windows([sample.tokens for sample in samples], size)
        if len(batches) < world.size:
            raise QuantizeError(
                f"{world.size} processes share {len(batches)} batches of calibration "
                "samples: start fewer, or give more text"
            )
        self._batches = world.share(list(enumerate(batches)))
        self._calls = BlockCalls(base)

    def run(self, phase: str, progress: Progress) -> QuantizedBlocks:
        """Quantize the blocks that are not in the folder yet.

        Raises:
            QuantizeError: a linear cannot be quantized; it is named.
        """
        base = self._base
        left = [i for i in range(len(base.blocks)) if _block(i) not in self._folder]
        if len(left) < len(base.blocks):
            progress.note(
                f"{phase}: {len(base.blocks) - len(left)} of {len(base.blocks)} "
                "blocks taken from the work folder"
            )
        if left:
            linears = sum(len(base.block_linears(index)) for index in left)
            with progress.phase(phase, linears) as bar, torch.no_grad():
                self._embed(store=left[0] == 0)
                for index in left:
                    self._quantize_block(index, bar)
        return QuantizedBlocks(base, self._recipe.bits, self._folder)

    def _embed(self, *, store: bool) -> None:
        with self._base.resident_outside():
            for number, tokens in self._batches:
                hidden = self._calls.embed(tokens)
                if store:
                    self._folder.save(_hidden(0, number), {"hidden": hidden})

    def _quantize_block(self, index: int, bar: Phase) -> None:
        start = perf_counter()
        base, folder = self._base, self._folder
        reports: list[LinearReport] = []
        tensors: dict[str, Tensor] = {}

        def on_group(group: dict[str, nn.Linear], xs: Iterator[Tensor]) -> None:
            for report, result, kept in self._quantize_group(group, xs):
                group[report.name].weight.data = result.weight
                packed = result.pack(kept, self._recipe.bits)
                for suffix, tensor in packed.tensors().items():
                    tensors[f"{report.name}.{suffix}"] = tensor
                reports.append(report)
                bar.advance(
                    detail=f"{report.name}  {report.outliers} kept  "
                    f"error {report.error:.2e}"
                )

        with base.resident_block(index) as block:
            linears = base.block_linears(index)

            def forward(number: int) -> Tensor:
                hidden = folder.load_tensor(_hidden(index, number), "hidden")
                hidden = hidden.to(base.device, copy=True)
                return self._calls.run(block, index, hidden)

            outputs = run_block(
                [partial(forward, number) for number, _ in self._batches],
                group_linears(linears),
                self._batches_in_memory(linears),
                on_group,
            )
            for (number, _), output in zip(self._batches, outputs, strict=True):
                folder.save(_hidden(index + 1, number), {"hidden": output})
        self._world.wait()
        if self._world.leads:
            notes = {
                "reports": json.dumps([asdict(report) for report in reports]),
                "seconds": str(perf_counter() - start),
            }
            folder.save(_block(index), tensors, notes)
        self._world.wait()
        for number, _ in self._batches:
            folder.remove(_hidden(index, number))
            if index + 1 == len(base.blocks):
                folder.remove(_hidden(index + 1, number))

    def _batches_in_memory(self, linears: dict[str, nn.Linear]) -> int:
        if self._base.device.type == "cuda":
            free = torch.cuda.mem_get_info(self._base.device)[0]
        else:
            free = psutil.virtual_memory().available
        features = sum(m.in_features + m.out_features for m in linears.values())
        batch_bytes = features * _BATCH_TOKENS * torch.float32.itemsize
        return int(_MEMORY_SHARE * free / batch_bytes)

    def _quantize_group(
        self, group: dict[str, nn.Linear], xs: Iterator[Tensor]
    ) -> list[tuple[LinearReport, GptqResult, Tensor]]:
        """Quantize linears that share their input, stacked into one matrix."""
        weights = [linear.weight.data for linear in group.values()]
        masks = [self._masks(name) for name in group]
        stacked_masks = [mask for mask in masks if mask is not None]
        hessian = Hessian(weights[0].shape[1], weights[0].device)
        for x in xs:
            hessian.add(x)
        self._world.add_up(hessian.total)
        self._world.add_up(hessian.tokens)
        H = hessian.mean()
        try:
            stacked = self._quantize_rows(
                torch.cat(weights),
                H,
                torch.cat(stacked_masks) if stacked_masks else None,
            )
        except QuantizeError as error:
            raise QuantizeError(f"{', '.join(group)}: {error}") from error
        results = []
        start = 0
        for name, W, mask in zip(group, weights, masks, strict=True):
            result = stacked.rows(slice(start, start + W.shape[0]))
            start += W.shape[0]
            if mask is None:
                mask = torch.zeros_like(W, dtype=torch.bool)
            report = LinearReport(
                name=name,
                bits=self._recipe.bits,
                group_size=self._recipe.group_size,
                outliers=int(mask.sum()),
                error=relative_error(W, result.weight, H),
                damp_percent=result.damp_percent,
            )
            results.append((report, result, mask))
        return results

    def _quantize_rows(self, W: Tensor, H: Tensor, kept: Tensor | None) -> GptqResult:
        """Quantize a matrix; each process works on some of its rows."""
        own = self._world.rows(W.shape[0])
        part = quantize_matrix(
            W[own],
            H,
            None if kept is None else kept[own],
            bits=self._recipe.bits,
            group_size=self._recipe.group_size,
            dtype=self._dtype,
            keep_original=self._recipe.outliers.kept_value == "original",
            config=self._recipe.gptq,
        )
        gather = partial(self._world.gather_rows, count=W.shape[0])
        return GptqResult(
            codes=gather(part.codes),
            zeros=gather(part.zeros),
            scales=gather(part.scales),
            weight=gather(part.weight),
            damp_percent=part.damp_percent,
        )


def _block(index: int) -> str:
    return f"block-{index:04d}"


def _hidden(boundary: int, batch: int) -> str:
    return f"hidden-{boundary:04d}-{batch:06d}"
