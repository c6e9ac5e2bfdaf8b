"""The tensors that a model has beside its quantized linears, as Transformers knows it.

No loader of vLLM's tells that an ordinary tensor of a quantized model did not come, and
Transformers makes up what is missing.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tacq_vllm.format.checkpoint import CONFIG_NAME
from tacq_vllm.format.json_object import read_json
from tacq_vllm.format.schema import FormatError

_BLOCK_COUNTS = (
    "num_hidden_layers",
    "num_layers",
    "n_layers",
    "n_layer",
    "encoder_layers",
    "decoder_layers",
)
"""What the configurations of Transformers call the number of blocks."""


@dataclass(frozen=True)
class Skeleton:
    """Shapes of a model's parameters."""

    shapes: dict[str, tuple[int, ...]]
    """By name, those of linears as they are in 16 bits."""
    twins: dict[str, str]
    """Names that may be missing where the other is there: tied parameters."""
    linears: frozenset[str]
    """Names of the linears that can be quantized: not the one that gives logits."""


def read_skeleton(folder: Path, num_tensors: int) -> Skeleton | None:
    """Build the model of a config.json without values.

    Args:
        folder: a checkpoint.
        num_tensors: what its files hold; a model of more blocks is not built.

    Returns:
        None where the model is not known: Transformers lacks it, its code is the
        checkpoint's own, or its tensors are stored otherwise than it holds them.

    Raises:
        FormatError: config.json contradicts itself or the files.
    """
    content = read_json(folder / CONFIG_NAME)
    model_class = _model_class(content)
    if model_class is None:
        return None
    # Before it is read: some configurations then hold a list of all blocks.
    check_blocks(content, num_tensors)
    return _build(folder, model_class)


def _model_class(content: dict[str, Any]) -> Any:
    """The class that Transformers takes without a checkpoint's own code, or None."""
    import transformers

    kind = content.get("model_type", "")
    if not isinstance(kind, str):
        raise FormatError(f"{CONFIG_NAME}: model_type {kind!r} is not a name")
    if kind not in transformers.CONFIG_MAPPING:
        return None
    match content.get("architectures"):
        case [str(name)] if name.isidentifier():
            found = getattr(transformers, name, None)
            base = transformers.PreTrainedModel
            if isinstance(found, type) and issubclass(found, base):
                return found
            if content.get("auto_map"):
                return None
    config_class = transformers.CONFIG_MAPPING[kind]
    return transformers.MODEL_FOR_CAUSAL_LM_MAPPING.get(config_class, None)


def check_blocks(content: dict[str, Any], num_tensors: int) -> None:
    """Refuse a model, or one inside it, that would take long to build for nothing.

    Raises:
        FormatError: config.json has more blocks than the files hold tensors.
    """
    parts = [content]
    for part in parts:
        parts += [value for value in part.values() if isinstance(value, dict)]
        for blocks in map(part.get, _BLOCK_COUNTS):
            if isinstance(blocks, int) and blocks > num_tensors:
                raise FormatError(
                    f"{CONFIG_NAME}: {blocks} blocks, but the files hold {num_tensors} "
                    "tensors"
                )


def _build(folder: Path, model_class: Any) -> Skeleton | None:
    import torch
    from transformers import AutoConfig
    from transformers.conversion_mapping import get_model_conversion_mapping

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        # Others may be code that is fetched.
        config._attn_implementation = "eager"
        with torch.device("meta"):
            model = model_class(config)
    # Nobody knows what a model's code raises for sizes that a stranger made up.
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise FormatError(f"{CONFIG_NAME}: no model can be made: {reason}") from error
    if get_model_conversion_mapping(model, add_legacy=False):
        return None
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    head = model.get_output_embeddings()
    linears = frozenset(
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    )
    return Skeleton(shapes, dict(model.all_tied_weights_keys), linears)
