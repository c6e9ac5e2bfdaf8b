"""The order of the phases that train a checkpoint (DL-QAT).

1. Calibration text becomes samples, some of which are held out.
2. The 16-bit model's states of the others are computed, if there is such a model.
3. The checkpoint is trained, its latent weights starting from the 16-bit ones.
4. What was trained is folded into codes, scales and kept weights.

Each keeps in the work folder what it has found: a run goes on where one before it has
stopped.
"""

from pathlib import Path

import torch
from accelerate import Accelerator

from tacq_vllm import __version__
from tacq_vllm.config import override_recipe
from tacq_vllm.convert.dequantized import export_dequantized
from tacq_vllm.format.checkpoint import CheckpointReader, read_schema
from tacq_vllm.format.schema import QuantizationSchema
from tacq_vllm.format.validation import check_whole, load_linear
from tacq_vllm.kernels.reference import dequantize
from tacq_vllm.quantize.calibration import calibrate
from tacq_vllm.quantize.depends import common_depends, digest
from tacq_vllm.quantize.errors import QuantizeError
from tacq_vllm.quantize.model import BaseModel, open_base_model
from tacq_vllm.quantize.progress import Progress
from tacq_vllm.quantize.samples import Sample
from tacq_vllm.quantize.weights import open_weights
from tacq_vllm.quantize.workdir import WorkDir, check_output, file_stamp
from tacq_vllm.quantize.world import World
from tacq_vllm.recover import teacher as teaching
from tacq_vllm.recover.batches import hold_out
from tacq_vllm.recover.config import RecoverConfig
from tacq_vllm.recover.export import WriteCard, export_student
from tacq_vllm.recover.state import RECORD_FIELDS, StateFolder
from tacq_vllm.recover.student import open_student
from tacq_vllm.recover.teacher import Teacher, run_teacher
from tacq_vllm.recover.trainer import Trainer, open_accelerator


def recover_checkpoint(
    source: Path,
    base_name: str | None,
    config: RecoverConfig,
    output: Path,
    device: torch.device,
    workdir: WorkDir,
    progress: Progress,
    write_card: WriteCard,
    data_root: Path | None = None,
    world: World | None = None,
) -> None:
    """Train a checkpoint and write what comes of it.

    Args:
        source: the checkpoint's folder.
        base_name: the 16-bit model that it was made from; None: latent weights start
            from the dequantized checkpoint, and there is nothing to be distilled.
        config: how to train.
        output: the folder to make; appears only when whole.
        device: where to train.
        workdir: where finished phases keep their tensors.
        progress: is told of every phase and step.
        write_card: adds the model card to a folder with all weights.
        data_root: folder of the named calibration sets; None: the Hub.
        world: the processes that share the work; None: this one alone.

    Raises:
        FormatError: `tacq verify` finds a fault in the checkpoint.
        QuantizeError: the base model, the choices or the text do not fit.
    """
    check_output(output, workdir.folder)
    check_whole(source)
    schema = read_schema(source)
    if schema.layout != "planes":
        raise QuantizeError(
            f"{source}: codes in {schema.layout} cannot be trained: give a checkpoint "
            "of tacq, gptq or rtn"
        )
    world = world or World()
    if base_name is None:
        config = override_recipe(config, {"distill": 0.0})
        progress.note("no base model: nothing is distilled")
    with world.leader_first():
        base = _open_base(source, base_name, device, workdir)
    _check_base(base, source, schema)
    common = common_depends(base, world)
    samples = calibrate(
        base, config.calibration, common, data_root, workdir, progress, world
    )
    common["tokens"] = digest(sample.tokens.numpy().tobytes() for sample in samples)
    common["scored"] = digest(sample.scored.numpy().tobytes() for sample in samples)
    with open_accelerator(config.precision, base.device) as accelerator:
        teacher = None
        if config.distill > 0:
            train, _ = hold_out(len(samples), config.held_out)
            taught = samples[: len(train)]
            teacher = _teach(
                base, taught, common, workdir, accelerator, progress, world
            )
        depends = {
            **common,
            "checkpoint": open_weights(source).fingerprint(),
            "quantization": digest([schema.model_dump_json()]),
            "choices": config.model_dump(mode="json"),
            "precision": accelerator.mixed_precision,
            "record": RECORD_FIELDS,
        }
        with world.leader_first():
            folder = StateFolder(workdir.phase("training", depends))
        student = open_student(base, source, schema, config)
        trained = sum(p.numel() for p in student.trained_state().values())
        progress.note(
            f"{trained:,} values are trained, {student.trained_share():.2%} of the "
            "weights"
        )
        history = Trainer(
            student,
            samples,
            teacher,
            config,
            accelerator,
            folder,
            world,
            spent=teacher.seconds if teacher else 0.0,
        ).run(progress)
    if world.leads:
        name = base.name if base_name else None
        export_student(
            student, source, schema, config, name, history, output, progress, write_card
        )
    world.wait()


def _open_base(
    source: Path, name: str | None, device: torch.device, workdir: WorkDir
) -> BaseModel:
    if name is not None:
        return open_base_model(name, device, workdir)
    # Its tokenizer and configuration count as its weights do.
    files = [(p.name, *file_stamp(p)) for p in sorted(source.iterdir()) if p.is_file()]
    folder = workdir.folder / f"dequantized-{digest([__version__, *files])[:16]}"
    if not folder.is_dir():
        export_dequantized(source, folder, Progress())
    return open_base_model(str(folder), device, workdir)


def _check_base(base: BaseModel, source: Path, schema: QuantizationSchema) -> None:
    """Refuse a model that is not the one that was quantized."""
    linears = base.linears()
    for name, shape in schema.linears.items():
        if name not in linears or tuple(linears[name].weight.shape) != shape:
            raise QuantizeError(
                f"{base.name}: has no linear {name} of the checkpoint's shape "
                f"{list(shape)}: not the model that was quantized"
            )
    first = next(iter(schema.linears))
    with CheckpointReader(source) as reader:
        quantized = dequantize(load_linear(reader, schema, first)).to(base.device)
    weight = base.weight(first)
    if float((quantized - weight).norm()) > float(weight.norm()):
        raise QuantizeError(
            f"{base.name}: {first} is too far from the checkpoint's: not the model "
            "that was quantized"
        )


def _teach(
    base: BaseModel,
    samples: list[Sample],
    common: dict[str, object],
    workdir: WorkDir,
    accelerator: Accelerator,
    progress: Progress,
    world: World,
) -> Teacher:
    depends = {
        **common,
        "samples": len(samples),
        "precision": accelerator.mixed_precision,
    }
    with world.leader_first():
        folder = workdir.phase(teaching.PHASE, depends)
    return run_teacher(base, samples, folder, accelerator, progress, world)
