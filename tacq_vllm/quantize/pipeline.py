"""From a 16-bit model to a checkpoint folder."""

from pathlib import Path

from tacq_vllm.config import Recipe
from tacq_vllm.quantize.errors import QuantizeError
from tacq_vllm.quantize.export import WriteCard, export_checkpoint
from tacq_vllm.quantize.methods.table import METHODS
from tacq_vllm.quantize.model import BaseModel
from tacq_vllm.quantize.passes import Passes
from tacq_vllm.quantize.progress import Progress
from tacq_vllm.quantize.workdir import WorkDir, check_output
from tacq_vllm.quantize.world import World


def quantize_model(
    base: BaseModel,
    recipe: Recipe,
    output: Path,
    workdir: WorkDir,
    progress: Progress,
    write_card: WriteCard,
    data_root: Path | None = None,
    world: World | None = None,
) -> None:
    """Make a checkpoint folder.

    Args:
        base: the 16-bit model.
        recipe: what to do.
        output: the folder to make; appears only when whole.
        workdir: where finished phases keep their tensors.
        progress: told of every phase and linear.
        write_card: adds the model card to a folder with all weights, given the
            quantization block.
        data_root: folder of the named calibration sets; None: the Hub.
        world: the processes that share the work; None: this one alone.

    Raises:
        QuantizeError: the model, the recipe or the calibration text do not fit.
    """
    check_output(output, workdir.folder)
    _check_model(base, progress)
    world = world or World()
    passes = Passes(base, recipe, workdir, progress, world, data_root)
    blocks = METHODS[recipe.method](passes)
    if world.leads:
        export_checkpoint(base, recipe, output, blocks, progress, write_card)
    world.wait()


def _check_model(base: BaseModel, progress: Progress) -> None:
    linears = base.linears()
    if not linears:
        raise QuantizeError(
            f"{type(base.model).__name__}: {base.block_name(0)} has no linears under "
            "self_attn or mlp: this architecture is not supported"
        )
    left = base.unquantized_modules()
    if left:
        quantized = sum(linear.weight.numel() for linear in linears.values())
        share = sum(left.values()) / (quantized + sum(left.values()))
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        progress.note(
            f"not quantized: {next(iter(left))}{more}, {share:.1%} of the weights of "
            "the blocks; they stay in 16 bits"
        )
