"""The order of the passes that make a TaCQ checkpoint (TaCQ paper, section 3).

1. GPTQ of the whole model without kept weights gives Q(W).
2. Gradients of the 16-bit model on the calibration text give |∂L/∂W|.
3. One global budget picks the weights with the highest score.
4. GPTQ again, those weights out of the grid and kept in 16 bits, gives the checkpoint.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor, nn

from tacq_vllm.config import Recipe
from tacq_vllm.format.checkpoint import CheckpointWriter
from tacq_vllm.format.schema import (
    DEFAULT_CIRCUIT,
    QuantizationSchema,
    check_linear_shape,
    storage_dtype,
)
from tacq_vllm.quantize.blocks import (
    batch_windows,
    capture_inputs,
    group_linears,
    run_block,
)
from tacq_vllm.quantize.calibration import calibration_windows
from tacq_vllm.quantize.errors import QuantizeError
from tacq_vllm.quantize.export import (
    published_recipe,
    staged_folder,
    write_config,
    write_unquantized,
)
from tacq_vllm.quantize.gptq import (
    GptqResult,
    Hessian,
    quantize_matrix,
    relative_error,
)
from tacq_vllm.quantize.model import BaseModel
from tacq_vllm.quantize.progress import Progress
from tacq_vllm.quantize.saliency import (
    accumulate_gradients,
    gradient_power,
    needs_gradients,
    needs_quantized,
    saliency,
)
from tacq_vllm.quantize.selection import select_top
from tacq_vllm.quantize.workdir import WorkDir

REPORT_NAME = "report.jsonl"
TIMINGS_NAME = "timings.json"

_BATCH_TOKENS = 4096
"""Tokens that go through a block at once."""

_GRADIENTS = "gradients"
_PLAIN = "plain"


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


Masks = Callable[[str], Tensor | None]
WriteCard = Callable[[Path, QuantizationSchema], None]
OnResult = Callable[[LinearReport, GptqResult, Tensor], None]


def quantize_model(
    base: BaseModel,
    recipe: Recipe,
    output: Path,
    workdir: WorkDir,
    progress: Progress,
    write_card: WriteCard,
) -> None:
    """Make a checkpoint folder; the model is as before afterwards.

    Args:
        base: the 16-bit model.
        recipe: what to do.
        output: the folder to make; appears only when whole.
        workdir: where finished phases keep their tensors.
        progress: told of every phase and linear.
        write_card: adds the model card to a folder with all weights, given the
            quantization block.

    Raises:
        QuantizeError: the model, the recipe or the calibration text do not fit.
    """
    linears = base.linears()
    _check_model(base, linears, recipe)
    dtype = base.storage_dtype(recipe.export.dtype)
    with staged_folder(output) as folder, torch.no_grad():
        windows = calibration_windows(base, recipe.calibration, progress)
        masks = _select(base, linears, recipe, windows, workdir, progress)

        writer = CheckpointWriter(folder, recipe.export.max_shard_bytes)
        reports: list[LinearReport] = []
        seconds: dict[str, float] = {}
        last = perf_counter()

        def keep(report: LinearReport, result: GptqResult, kept: Tensor) -> None:
            nonlocal last
            packed = result.pack(kept, recipe.bits)
            for suffix, tensor in packed.tensors().items():
                writer.add(f"{report.name}.{suffix}", tensor)
            reports.append(report)
            now = perf_counter()
            seconds[report.name], last = now - last, now

        gptq_pass(base, recipe, windows, masks, "quantization", progress, keep)
        write_unquantized(writer, base, dtype)
        writer.close()
        schema = QuantizationSchema(
            bits=recipe.bits,
            group_size=recipe.group_size,
            dtype=dtype,
            linears={name: _shape(linear) for name, linear in linears.items()},
            circuits={DEFAULT_CIRCUIT: {r.name: r.outliers for r in reports}},
            recipe=published_recipe(recipe),
        )
        rows = [json.dumps(asdict(report)) + "\n" for report in reports]
        (folder / REPORT_NAME).write_text("".join(rows))
        timings = {"phases": progress.seconds, "linears": seconds}
        (folder / TIMINGS_NAME).write_text(json.dumps(timings, indent=2) + "\n")
        write_card(folder, schema)
        # Last: without config.json nothing takes the folder for a checkpoint.
        write_config(folder, base, schema)


def gptq_pass(
    base: BaseModel,
    recipe: Recipe,
    windows: list[Tensor],
    masks: Masks,
    phase: str,
    progress: Progress,
    on_result: OnResult,
) -> None:
    """Quantize every linear in order, each on what the quantized ones before produce.

    Args:
        base: the model; its weights are restored block by block.
        recipe: bits, group size, GPTQ settings.
        windows: calibration tokens.
        masks: the weights that a linear keeps, or None.
        phase: name under which progress is reported.
        progress: told of every linear.
        on_result: called with each linear's report, result and mask.
    """
    inputs = capture_inputs(base, batch_windows(windows, _BATCH_TOKENS))
    with progress.phase(phase, len(base.linears())) as bar:
        for index, block in enumerate(base.blocks):
            linears = base.block_linears(index)
            originals = {name: m.weight.data for name, m in linears.items()}

            def on_group(group: dict[str, nn.Linear], xs: list[Tensor]) -> None:
                for report, result, kept in _quantize_group(
                    base, recipe, group, xs, masks
                ):
                    group[report.name].weight.data = result.weight
                    on_result(report, result, kept)
                    bar.advance(
                        detail=f"{report.name}  {report.outliers} kept  "
                        f"error {report.error:.2e}"
                    )

            try:
                run_block(block, index, inputs, group_linears(linears), on_group)
            finally:
                for name, module in linears.items():
                    module.weight.data = originals[name]


def _select(
    base: BaseModel,
    linears: dict[str, nn.Linear],
    recipe: Recipe,
    windows: list[Tensor],
    workdir: WorkDir,
    progress: Progress,
) -> Masks:
    """Passes 1 to 3: the weights that each linear keeps."""
    total = sum(linear.weight.numel() for linear in linears.values())
    budget = int(recipe.outlier_ratio * total)
    if budget == 0:
        return lambda name: None
    metric = recipe.outliers.saliency
    if needs_quantized(metric):
        gptq_pass(
            base,
            recipe,
            windows,
            lambda name: None,
            "plain quantization",
            progress,
            lambda report, result, kept: workdir.save(
                _PLAIN, report.name, result.weight
            ),
        )
    if needs_gradients(metric):
        power = gradient_power(metric)
        gradients = accumulate_gradients(base, windows, power, progress)
        for name in linears:
            workdir.save(_GRADIENTS, name, gradients.pop(name))

    def scores(name: str) -> Tensor:
        W = linears[name].weight
        load = partial(workdir.load, name=name)
        gradient = load(_GRADIENTS) if needs_gradients(metric) else W
        quantized = load(_PLAIN) if needs_quantized(metric) else W
        return saliency(metric, W, gradient.to(W.device), quantized.to(W.device))

    selection = select_top(linears, scores, budget)
    return lambda name: selection.mask(name, scores(name))


def _quantize_group(
    base: BaseModel,
    recipe: Recipe,
    group: dict[str, nn.Linear],
    xs: list[Tensor],
    masks: Masks,
) -> list[tuple[LinearReport, GptqResult, Tensor]]:
    """Quantize linears that share their input, their rows stacked into one matrix."""
    weights = [linear.weight.data for linear in group.values()]
    kept = [masks(name) for name in group]
    stacked_kept = [mask for mask in kept if mask is not None]
    hessian = Hessian(weights[0].shape[1], weights[0].device)
    for x in xs:
        hessian.add(x)
    H = hessian.mean()
    try:
        stacked = quantize_matrix(
            torch.cat(weights),
            H,
            torch.cat(stacked_kept) if stacked_kept else None,
            bits=recipe.bits,
            group_size=recipe.group_size,
            dtype=storage_dtype(base.storage_dtype(recipe.export.dtype)),
            keep_original=recipe.outliers.kept_value == "original",
            config=recipe.gptq,
        )
    except QuantizeError as error:
        raise QuantizeError(f"{', '.join(group)}: {error}") from error
    results = []
    start = 0
    for name, W, mask in zip(group, weights, kept, strict=True):
        rows = slice(start, start + W.shape[0])
        start = rows.stop
        result = GptqResult(
            codes=stacked.codes[rows],
            zeros=stacked.zeros[rows],
            scales=stacked.scales[rows],
            weight=stacked.weight[rows],
            damp_percent=stacked.damp_percent,
        )
        if mask is None:
            mask = torch.zeros_like(W, dtype=torch.bool)
        report = LinearReport(
            name=name,
            bits=recipe.bits,
            group_size=recipe.group_size,
            outliers=int(mask.sum()),
            error=relative_error(W, result.weight, H),
            damp_percent=result.damp_percent,
        )
        results.append((report, result, mask))
    return results


def _check_model(
    base: BaseModel, linears: dict[str, nn.Linear], recipe: Recipe
) -> None:
    if not linears:
        raise QuantizeError(
            f"{type(base.model).__name__}: no linears under the attention and MLP of "
            "its decoder blocks"
        )
    for name, linear in linears.items():
        try:
            check_linear_shape(name, *_shape(linear), recipe.group_size)
        except ValueError as error:
            raise QuantizeError(str(error)) from error


def _shape(linear: nn.Linear) -> tuple[int, int]:
    return linear.out_features, linear.in_features
