"""From a trained model to a checkpoint of the same format."""

from collections.abc import Callable
from pathlib import Path

from tacq_vllm.config import published_choices
from tacq_vllm.convert.folder import (
    MAX_SHARD_BYTES,
    copy_companions,
    copy_unquantized,
    write_config,
)
from tacq_vllm.format.checkpoint import (
    CONFIG_NAME,
    CheckpointReader,
    CheckpointWriter,
)
from tacq_vllm.format.json_object import read_json
from tacq_vllm.format.schema import QuantizationSchema
from tacq_vllm.format.staging import staged_folder
from tacq_vllm.format.values import check_linear
from tacq_vllm.quantize.errors import QuantizeError
from tacq_vllm.quantize.progress import Progress
from tacq_vllm.quantize.workdir import check_output
from tacq_vllm.recover.config import RecoverConfig
from tacq_vllm.recover.curve import PICTURE_NAME, draw_losses, write_losses
from tacq_vllm.recover.state import History
from tacq_vllm.recover.student import Student

WriteCard = Callable[[Path, QuantizationSchema], None]
"""As `quantize.export.WriteCard`, of packed checkpoints."""


def export_student(
    student: Student,
    source: Path,
    schema: QuantizationSchema,
    config: RecoverConfig,
    base_name: str | None,
    history: History,
    output: Path,
    progress: Progress,
    write_card: WriteCard,
) -> None:
    """Write the checkpoint folder, which appears only when it is whole.

    Quantized linears are the student's; all else is copied from the source.

    Raises:
        QuantizeError: as `check_output`, or a value does not fit the 16-bit type.
    """
    check_output(output)
    linears = student.linears()
    recipe = {**schema.recipe, "recover": {"base": base_name}}
    recipe["recover"] |= published_choices(config)
    schema = schema.model_copy(update={"recipe": recipe})
    with (
        staged_folder(output) as folder,
        CheckpointReader(source) as reader,
        progress.phase("export", len(linears)) as bar,
    ):
        writer = CheckpointWriter(folder, MAX_SHARD_BYTES)
        for name in schema.linears:
            packed = linears[name].pack()
            fault = check_linear(packed)
            if fault:
                raise QuantizeError(f"{name}.{fault}: lower the learning rates")
            for suffix, tensor in packed.tensors().items():
                writer.add(f"{name}.{suffix}", tensor)
            bar.advance(1, name)
        copy_unquantized(reader, schema, writer)
        writer.close()
        copy_companions(source, folder)
        write_losses(history, folder)
        try:
            draw_losses(history, folder)
        except ModuleNotFoundError as error:
            progress.note(f"no {PICTURE_NAME}: {error}: pip install 'tacq-vllm[plots]'")
        write_card(folder, schema)
        block = schema.model_dump(mode="json")
        config_json = read_json(source / CONFIG_NAME)
        write_config(folder, config_json | {"quantization_config": block})
