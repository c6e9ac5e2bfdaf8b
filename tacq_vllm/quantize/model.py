"""The 16-bit model that is to be quantized: its modules in memory, its weights on disk.

The modules are built without values. A part of the model has its weights, in float32
on the device, while it is resident: so a model needs memory for one decoder block.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
)

from tacq_vllm.config import StorageDtype
from tacq_vllm.format.simulated import SIMULATED_KEY
from tacq_vllm.quantize.conversion import check_shape, open_files
from tacq_vllm.quantize.errors import (
    EXPECTED,
    QuantizeError,
    is_out_of_memory,
    loading_reason,
)
from tacq_vllm.quantize.source import locate_model, model_name
from tacq_vllm.quantize.weights import WeightFiles
from tacq_vllm.quantize.workdir import WorkDir, fingerprint

BLOCK_PARTS = ("self_attn", "mlp")
"""Parts of a decoder block whose linears are quantized (TaCQ paper, appendix D)."""

ROUTERS = ("gate", "router", "shared_expert_gate")
"""Linears that choose experts: small, and never quantized."""

_QUANTIZED_KEYS = ("quantization_config", SIMULATED_KEY)


@dataclass(frozen=True)
class BaseModel:
    """A model, its tokenizer and its weight files."""

    name: str
    model: PreTrainedModel
    """Its parameters are on the meta device, but for those that are resident."""
    tokenizer: Any
    stored_dtype: torch.dtype
    """Type of the weights as published."""
    device: torch.device
    weights: WeightFiles
    """By the names that the modules have."""
    published: WeightFiles
    """By the names that they were published under: mostly the same files."""
    hub_id: str | None
    """What the Hub calls it; None where it did not come from there."""

    @property
    def blocks(self) -> list[nn.Module]:
        """The decoder blocks in order."""
        return list(self._layers)

    def block_name(self, index: int) -> str:
        """Full module name of a decoder block."""
        return f"{self._layers_name}.{index}"

    def block_of(self, linear: str) -> int:
        """The number of the block that a linear lies in, by its full name."""
        return int(linear.removeprefix(f"{self._layers_name}.").split(".")[0])

    def block_linears(self, index: int) -> dict[str, nn.Linear]:
        """The linears of one block that are quantized, by full name."""
        prefix = self.block_name(index)
        return {
            f"{prefix}.{name}": module
            for name, module in self.blocks[index].named_modules()
            if isinstance(module, nn.Linear)
            and name.split(".")[0] in BLOCK_PARTS
            and name.split(".")[-1] not in ROUTERS
        }

    def linears(self) -> dict[str, nn.Linear]:
        """All linears that are quantized, in the order of the blocks."""
        return {
            name: linear
            for index in range(len(self.blocks))
            for name, linear in self.block_linears(index).items()
        }

    def unquantized_modules(self) -> dict[str, int]:
        """Sizes of the modules in the blocks whose matrices stay as they are."""
        quantized = self.linears()
        sizes: dict[str, int] = {}
        for index, block in enumerate(self.blocks):
            for name, parameter in block.named_parameters():
                module = f"{self.block_name(index)}.{name.rpartition('.')[0]}"
                is_router = module.rpartition(".")[2] in ROUTERS
                if parameter.dim() > 1 and not is_router and module not in quantized:
                    sizes[module] = sizes.get(module, 0) + parameter.numel()
        return sizes

    def weight(self, linear: str) -> Tensor:
        """The weight of a linear: float32 [out, in] on the device."""
        return self._load(f"{linear}.weight")

    @contextmanager
    def resident_block(self, index: int) -> Iterator[nn.Module]:
        """Give a decoder block its weights within the body."""
        prefix = self.block_name(index)
        block = self.blocks[index]
        with self._resident(f"{prefix}.{name}" for name, _ in block.named_parameters()):
            yield block

    @contextmanager
    def resident_outside(self) -> Iterator[None]:
        """Give all but the decoder blocks their weights: embeddings, norm, head."""
        inside = f"{self._layers_name}."
        with self._resident(n for n in self._names() if not n.startswith(inside)):
            yield

    @contextmanager
    def resident(self) -> Iterator[PreTrainedModel]:
        """Give the whole model its weights: it must fit into the device's memory."""
        with self._resident(self._names()):
            yield self.model

    def fingerprint(self) -> str:
        """Digest of the model's configuration and of its files."""
        config = self.model.config.to_json_string(use_diff=False)
        return fingerprint({"config": config, "weights": self.weights.fingerprint()})

    def storage_dtype(self, wanted: str) -> StorageDtype:
        """The 16-bit type to store, `auto` meaning the base model's own."""
        if wanted == "float16" or (
            wanted == "auto" and self.stored_dtype == torch.float16
        ):
            return "float16"
        return "bfloat16"

    def stored_name(self, name: str) -> str:
        """The name under which a parameter is stored: its own, or its tied twin's."""
        if name in self.weights:
            return name
        return str(self.model.all_tied_weights_keys.get(name, name))

    @cached_property
    def _layers(self) -> nn.ModuleList:
        decoder = self.model.get_decoder()
        layers = getattr(decoder, "layers", None)
        if not isinstance(layers, nn.ModuleList) or not layers:
            raise QuantizeError(
                f"{type(self.model).__name__}: {type(decoder).__name__} has no list of "
                "decoder blocks named `layers`: this architecture is not supported"
            )
        return layers

    @cached_property
    def _layers_name(self) -> str:
        modules = self.model.named_modules()
        return str(next(name for name, m in modules if m is self._layers))

    def _names(self) -> list[str]:
        return [name for name, _ in self.model.named_parameters(remove_duplicate=False)]

    def _load(self, name: str) -> Tensor:
        stored = self.weights.load(self.stored_name(name))
        if not bool(stored.isfinite().all()):
            raise QuantizeError(f"{name}: a value of the model is not finite")
        # A copy: what is mapped from a file would count as this process's memory.
        return stored.to(self.device, torch.float32, copy=True)

    @contextmanager
    def _resident(self, names: Iterable[str]) -> Iterator[None]:
        loaded: dict[str, nn.Parameter] = {}
        empty: list[tuple[dict[str, Any], str, nn.Parameter]] = []
        try:
            for name in names:
                stored = self.stored_name(name)
                if stored not in loaded:
                    values = self._load(name)
                    loaded[stored] = nn.Parameter(values, requires_grad=False)
                module, _, leaf = name.rpartition(".")
                parameters = self.model.get_submodule(module)._parameters
                empty.append((parameters, leaf, parameters[leaf]))
                parameters[leaf] = loaded[stored]
            yield
        finally:
            for parameters, leaf, parameter in empty:
                parameters[leaf] = parameter


def open_base_model(model: str, device: torch.device, workdir: WorkDir) -> BaseModel:
    """Open a Hub id, a local folder or a .gguf file.

    A GGUF file, and a model whose files name tensors otherwise than its modules do,
    is read whole, once, and stored anew in the work folder.

    Raises:
        QuantizeError: the model cannot be loaded or is quantized already.
    """
    # Of a broken config.json or tokenizer.json Transformers raises anything.
    with loading_errors(model, Exception):
        source = locate_model(model)
        config = AutoConfig.from_pretrained(**source.arguments)
        if any(getattr(config, key, None) is not None for key in _QUANTIZED_KEYS):
            raise QuantizeError(f"{model}: already quantized; give the 16-bit model")
        stored_dtype = config.dtype or torch.float32
        with init_empty_weights(include_buffers=False):
            skeleton = AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, trust_remote_code=False
            )
        tokenizer = AutoTokenizer.from_pretrained(**source.arguments)
    with loading_errors(model, *EXPECTED):
        published, weights = open_files(source, skeleton, workdir)
    for name, tensor in skeleton.state_dict().items():
        if name in weights:
            check_shape(model, name, weights.shapes[name], tensor.shape)
    for name, buffer in list(skeleton.named_buffers()):
        values = weights.load(name).to(buffer.dtype) if name in weights else buffer
        owner, _, leaf = name.rpartition(".")
        skeleton.get_submodule(owner)._buffers[leaf] = values.to(device)
    is_local = source.gguf is not None or Path(model).is_dir()
    return BaseModel(
        name=model_name(model),
        model=skeleton.eval().requires_grad_(False),
        tokenizer=tokenizer,
        stored_dtype=stored_dtype,
        device=device,
        weights=weights,
        published=published,
        hub_id=None if is_local else model,
    )


@contextmanager
def loading_errors(model: str, *kinds: type[Exception]) -> Iterator[None]:
    """Tell errors of these kinds in one line, but for want of memory.

    Raises:
        QuantizeError: naming the model.
    """
    try:
        yield
    except kinds as error:
        if isinstance(error, QuantizeError) or is_out_of_memory(error):
            raise
        raise QuantizeError(
            f"{model}: cannot be loaded: {loading_reason(error)}"
        ) from error
