"""Loading TaCQ checkpoints with Transformers.

Importing this module registers the quantizer; Transformers has no entry points, so
one import before `from_pretrained` is what it takes:

    import tacq_vllm.integrations.transformers
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from tacq_vllm.format.layouts import layout_of, linear_specs
from tacq_vllm.format.schema import (
    QUANT_METHOD,
    FormatError,
    QuantizationSchema,
    parse_schema,
)
from tacq_vllm.format.validation import check_headers, fault_line
from tacq_vllm.format.values import check_linear, check_range
from tacq_vllm.kernels.ops import prepare
from tacq_vllm.layers import TacqLinear


class TacqConfig(QuantizationConfigMixin):
    """The `quantization_config` block, as Transformers holds it."""

    def __init__(self, **block: Any) -> None:
        # Transformers itself constructs it without the method's name.
        self.schema = parse_schema({"quant_method": QUANT_METHOD, **block})
        self.quant_method = QUANT_METHOD

    def to_dict(self) -> dict[str, Any]:
        """The block as config.json stores it."""
        return self.schema.model_dump(mode="json")


class TacqQuantizer(HfQuantizer):
    """Swaps quantized linears for `TacqLinear` and checks what was loaded."""

    requires_calibration = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._files: dict[str, str] = {}
        """The file of each tensor of the quantized linears."""

    @property
    def schema(self) -> QuantizationSchema:
        """The parsed quantization block."""
        schema: QuantizationSchema = self.quantization_config.schema
        return schema

    def is_serializable(self) -> bool:
        """`save_pretrained` writes the packed tensors."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters on top can be trained; the packed weights have no gradients."""
        return True

    def _process_model_before_weight_loading(
        self,
        model: PreTrainedModel,
        checkpoint_files: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        if checkpoint_files:
            self._files = check_headers(Path(checkpoint_files[0]).parent, self.schema)
        for name, (out_features, in_features) in self.schema.linears.items():
            try:
                dense = model.get_submodule(name)
            except AttributeError as error:
                raise FormatError(f"{name}: the model has no such module") from error
            if not isinstance(dense, nn.Linear) or dense.weight.shape != (
                out_features,
                in_features,
            ):
                raise FormatError(
                    f"{name}: the model has {dense}, the checkpoint a linear "
                    f"[{out_features}, {in_features}]"
                )
            with torch.device("meta"):
                packed = TacqLinear(
                    linear_specs(self.schema, name),
                    layout_of(self.schema),
                    in_features,
                    dense.bias,
                )
            model.set_submodule(name, packed)

    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **kwargs: Any
    ) -> PreTrainedModel:
        for name in self.schema.linears:
            packed = model.get_submodule(name).packed
            fault = check_linear(packed) or check_range(packed, model.dtype)
            if fault:
                raise FormatError(fault_line(self._files, name, fault))
        for parameter in model.parameters():
            # Tensors that Transformers merges while loading keep the stored type.
            if parameter.dtype == self.schema.torch_dtype:
                parameter.data = parameter.data.to(model.dtype)
        for name in self.schema.linears:
            linear = model.get_submodule(name)
            linear.arrange(model.dtype)
            prepare(linear.held, model.dtype, linear.bias)
        return model

    def _dequantize(
        self, model: PreTrainedModel, dtype: torch.dtype | None = None
    ) -> PreTrainedModel:
        for name in self.schema.linears:
            packed = model.get_submodule(name)
            weight = packed.dequantize(dtype or model.dtype)
            model.set_submodule(name, _dense(weight, packed.bias))
        return model


def register() -> None:
    """Make Transformers know `quant_method: tacq`; calling it again does nothing."""
    if QUANT_METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(QUANT_METHOD)(TacqConfig)
    if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(QUANT_METHOD)(TacqQuantizer)


def _dense(weight: Tensor, bias: nn.Parameter | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    linear.register_parameter("bias", bias)
    return linear


register()
