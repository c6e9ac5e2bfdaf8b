"""A checkpoint of another format: its layout, its linears, what else it has."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from tacq_vllm.config import one_line
from tacq_vllm.convert.compressed import CompressedLayout
from tacq_vllm.convert.gptq import GptqLayout
from tacq_vllm.convert.layout import SourceLayout, SourceLinear
from tacq_vllm.format.checkpoint import CONFIG_NAME
from tacq_vllm.format.json_object import read_json
from tacq_vllm.format.parallel import fused_modules, half_quantized
from tacq_vllm.format.schema import check_linear_shape
from tacq_vllm.format.skeleton import check_blocks
from tacq_vllm.quantize.errors import QuantizeError
from tacq_vllm.quantize.model import loading_errors
from tacq_vllm.quantize.weights import WeightFiles, open_weights

GPTQ_CONFIG_NAME = "quantize_config.json"
"""Where older GPTQ checkpoints say how they are quantized."""


@dataclass(frozen=True)
class Source:
    """The checkpoint that is imported."""

    folder: Path
    config: dict[str, Any]
    """config.json without its `quantization_config`."""
    layout: SourceLayout
    files: WeightFiles

    @cached_property
    def linears(self) -> dict[str, nn.Linear]:
        """The quantized linears, by name, as the model has them: without values.

        Raises:
            FormatError: config.json has more blocks than there are tensors.
            QuantizeError: there are none, or TaCQ cannot have these.
        """
        marker = f".{self.layout.suffixes[0]}"
        names = {n.removesuffix(marker) for n in self.files if n.endswith(marker)}
        if not names:
            raise QuantizeError(f"{self.folder}: no tensor is named NAME{marker}")
        check_blocks(self.config, len(self.files.shapes))
        known = _model_linears(self.folder)
        for name in sorted(names):
            if name not in known:
                raise QuantizeError(
                    f"{name}: not a linear of the decoder's blocks as Transformers has "
                    "them: experts and lm_head cannot be imported"
                )
        for module in fused_modules(known):
            for fault in half_quantized(module, names):
                raise QuantizeError(fault)
        linears = {name: linear for name, linear in known.items() if name in names}
        for name, linear in linears.items():
            out_features, in_features = linear.weight.shape
            try:
                check_linear_shape(
                    name, out_features, in_features, self.layout.group_size
                )
            except ValueError as error:
                raise QuantizeError(f"{self.folder}: {error}") from error
        return linears

    def linear(self, name: str) -> SourceLinear:
        """Read one quantized linear.

        Raises:
            QuantizeError: its tensors are not what the layout says.
        """
        stored = (f"{name}.{suffix}" for suffix in self.layout.suffixes)
        tensors = {
            tensor.rpartition(".")[2]: self.files.load(tensor)
            for tensor in stored
            if tensor in self.files
        }
        linear = self.linears[name]
        try:
            return self.layout.unpack(tensors, linear.out_features, linear.in_features)
        except QuantizeError as error:
            raise QuantizeError(f"{name}.{error}") from error

    def others(self) -> Iterator[str]:
        """Names of the tensors that are stored as they are.

        Raises:
            QuantizeError: a quantized linear has a tensor that is not understood.
        """
        for tensor in self.files:
            name, _, suffix = tensor.rpartition(".")
            linear = self.linears.get(name)
            if linear is None:
                yield tensor
            elif suffix == "bias":
                if linear.bias is not None:
                    yield tensor
                elif bool(self.files.load(tensor).any()):
                    raise QuantizeError(f"{tensor}: the model has no such bias")
            elif suffix not in self.layout.suffixes:
                raise QuantizeError(f"{tensor}: not a tensor of {self.layout.title}")


def open_source(folder: Path) -> Source:
    """Read the configuration of a checkpoint and the headers of its files.

    Raises:
        FormatError: there is no config.json.
        QuantizeError: another format, or TaCQ cannot store what it says.
    """
    config = read_json(folder / CONFIG_NAME)
    block = config.pop("quantization_config", None)
    if block is None and (folder / GPTQ_CONFIG_NAME).is_file():
        block = {"quant_method": "gptq"} | read_json(folder / GPTQ_CONFIG_NAME)
    return Source(folder, config, _parse_layout(folder, block), open_weights(folder))


def _parse_layout(folder: Path, block: object) -> SourceLayout:
    method = block.get("quant_method") if isinstance(block, dict) else None
    if not isinstance(block, dict) or method not in ("gptq", "compressed-tensors"):
        raise QuantizeError(
            f"{folder}: quant_method is {method!r}; gptq and compressed-tensors can be "
            "imported"
        )
    try:
        if method == "gptq":
            return GptqLayout.parse(block)
        return CompressedLayout.model_validate(block)
    except ValidationError as error:
        raise QuantizeError(f"{folder}: quantization: {one_line(error)}") from error


def _model_linears(folder: Path) -> dict[str, nn.Linear]:
    # Without the argument Transformers asks on a terminal whether to run its code. Of a
    # broken config.json it raises anything.
    with loading_errors(str(folder), Exception):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not model.get_output_embeddings()
    }
