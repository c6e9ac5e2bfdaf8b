"""Loading the 16-bit model that is to be quantized, and finding its linears."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedModel,
)

from tacq_vllm.config import StorageDtype
from tacq_vllm.quantize.errors import QuantizeError

BLOCK_PARTS = ("self_attn", "mlp")
"""Parts of a decoder block whose linears are quantized (TaCQ paper, appendix D)."""


@dataclass(frozen=True)
class BaseModel:
    """A model in float32 with its tokenizer."""

    name: str
    model: PreTrainedModel
    tokenizer: Any
    stored_dtype: torch.dtype
    """Type of the weights as published."""

    @property
    def blocks(self) -> list[nn.Module]:
        """The decoder blocks in order."""
        return list(self.model.get_decoder().layers)

    def block_name(self, index: int) -> str:
        """Full module name of a decoder block."""
        block = self.blocks[index]
        names = (name for name, m in self.model.named_modules() if m is block)
        return str(next(names))

    def block_linears(self, index: int) -> dict[str, nn.Linear]:
        """The linears of one block that are quantized, by full name."""
        prefix = self.block_name(index)
        return {
            f"{prefix}.{name}": module
            for name, module in self.blocks[index].named_modules()
            if isinstance(module, nn.Linear) and name.split(".")[0] in BLOCK_PARTS
        }

    def linears(self) -> dict[str, nn.Linear]:
        """All linears that are quantized, in the order of the blocks."""
        return {
            name: linear
            for index in range(len(self.blocks))
            for name, linear in self.block_linears(index).items()
        }

    def storage_dtype(self, wanted: str) -> StorageDtype:
        """The 16-bit type to store, `auto` meaning the base model's own."""
        if wanted == "float16" or (
            wanted == "auto" and self.stored_dtype == torch.float16
        ):
            return "float16"
        return "bfloat16"


def load_base_model(model: str, device: torch.device) -> BaseModel:
    """Load a Hub id, a local folder or a .gguf file (dequantized) in float32.

    Raises:
        QuantizeError: the model cannot be loaded or is quantized already.
    """
    path = Path(model)
    source: dict[str, Any] = {"pretrained_model_name_or_path": model}
    if path.suffix == ".gguf":
        if not path.is_file():
            raise QuantizeError(f"{model}: no such file")
        source = {
            "pretrained_model_name_or_path": str(path.parent),
            "gguf_file": path.name,
        }
    elif path.is_dir() and not (path / "config.json").is_file():
        raise QuantizeError(f"{model}: the folder has no config.json")
    try:
        config = AutoConfig.from_pretrained(**source)
        if getattr(config, "quantization_config", None) is not None:
            raise QuantizeError(f"{model}: already quantized; give the 16-bit model")
        extra: dict[str, Any] = {"dtype": torch.float32}
        if "gguf_file" in source:
            extra["quantization_config"] = GgufConfig(dequantize=True)
        loaded = AutoModelForCausalLM.from_pretrained(**source, **extra)
        tokenizer = AutoTokenizer.from_pretrained(**source)
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        if isinstance(error, QuantizeError):
            raise
        reason = str(error).strip().splitlines()[0]
        raise QuantizeError(f"{model}: cannot be loaded: {reason}") from error
    loaded.eval().requires_grad_(False).to(device)
    name = path.absolute().name if path.is_dir() else model
    return BaseModel(
        name=path.stem if path.suffix == ".gguf" else name,
        model=loaded,
        tokenizer=tokenizer,
        stored_dtype=config.dtype or torch.float32,
    )
