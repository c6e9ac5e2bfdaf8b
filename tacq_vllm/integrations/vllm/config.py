"""The `QuantizationConfig` that vLLM builds from a checkpoint's config.json."""

from typing import Any

import torch
from vllm import envs
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)

from tacq_vllm.format.parallel import half_quantized
from tacq_vllm.format.schema import (
    QUANT_METHOD,
    FormatError,
    QuantizationSchema,
    parse_schema,
)
from tacq_vllm.format.validation import check_headers
from tacq_vllm.integrations.vllm.errors import refuse
from tacq_vllm.integrations.vllm.files import weights_folder
from tacq_vllm.integrations.vllm.parallel import check_ranks
from tacq_vllm.integrations.vllm.summary import LoadSummary

_DRAFT = "draft_model."
"""What vLLM puts before the names of a model that drafts for another."""

_FUSED = {
    "qkv_proj": ["q_proj", "k_proj", "v_proj"],
    "gate_up_proj": ["gate_proj", "up_proj"],
}
"""What vLLM fuses in models that do not say so, as StableLM."""


@register_quantization_config(QUANT_METHOD)
class TacqConfig(QuantizationConfig):
    """Which linears are quantized, and how; pickled to every worker."""

    def __init__(self, schema: QuantizationSchema | None = None) -> None:
        super().__init__()
        if schema is None:
            # What vLLM does when --quantization is given and config.json has no block.
            refuse(
                "--quantization tacq, but config.json has no quantization_config: "
                "make a checkpoint with `tacq quantize`, or leave the flag out"
            )
        self.schema = schema
        self._stored_names = {name: name for name in schema.linears}
        """Name of a linear in the checkpoint by its name in vLLM's model."""
        self._files: dict[str, str] = {}
        """The file of each tensor of the quantized linears, once that is known."""
        self._summary = LoadSummary(schema)

    @classmethod
    def get_name(cls) -> str:
        """Value of `--quantization` and `quant_method`."""
        return QUANT_METHOD

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        """Types of the activations."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Oldest NVIDIA generation: Turing."""
        return 75

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Everything is in config.json."""
        return []

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> None:
        """Take over nothing; refuse a TaCQ checkpoint under another method's flag.

        Raises:
            ValueError: `--quantization` names another method.
        """
        stored = hf_quant_cfg.get("quant_method")
        if stored == QUANT_METHOD and user_quant not in (None, QUANT_METHOD):
            refuse(
                f"this is a TaCQ checkpoint, not {user_quant!r}: serve it with "
                "--quantization tacq, or without the flag"
            )

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "TacqConfig":
        """Parse the `quantization_config` block.

        Raises:
            ValueError: it is not what SPEC.md describes.
        """
        try:
            return cls(parse_schema(config))
        except FormatError as error:
            refuse(error)

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None
    ) -> None:
        """Check what can be checked before any worker starts.

        That is what the kernels cannot do, the number of ranks, and the headers of the
        files.

        Raises:
            ValueError: something is not supported, the checkpoint cannot be cut so, or
                its files are at fault.
        """
        self._summary.name(model_name)
        if envs.VLLM_BATCH_INVARIANT:
            refuse(
                "VLLM_BATCH_INVARIANT is not supported: how the kernels add up depends "
                "on the number of tokens; unset it"
            )
        check_ranks(self.schema)
        folder = weights_folder(model_name, revision)
        if folder is not None:
            try:
                self._files = check_headers(folder, self.schema)
            except FormatError as error:
                refuse(error)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Follow a model that renames its modules, and then one inside it."""
        self._stored_names |= {
            mapped: stored
            for name, stored in self._stored_names.items()
            for mapped in hf_to_vllm_mapper.apply_list([name])
        }

    def get_quant_method(
        self, layer: torch.nn.Module, prefix: str
    ) -> QuantizeMethodBase | None:
        """The method of a linear; embeddings and attention are not quantized.

        Raises:
            ValueError: experts, or a part of a fused linear alone, are quantized.
        """
        # Heavy, and not needed where vLLM only parses its command line.
        from vllm.model_executor.layers.fused_moe import RoutedExperts
        from vllm.model_executor.layers.linear import (
            LinearBase,
            UnquantizedLinearMethod,
        )

        from tacq_vllm.integrations.vllm.linear import TacqLinearMethod

        if isinstance(layer, RoutedExperts):
            self._check_experts()
        if not isinstance(layer, LinearBase):
            return None
        names = self._parts(prefix)
        if not any(name in self._stored_names for name in names):
            return UnquantizedLinearMethod()
        for fault in half_quantized(names, self._stored_names):
            refuse(fault)
        stored = [self._stored_names[name] for name in names]
        return TacqLinearMethod(self.schema, stored, self._files, self._summary)

    def _check_experts(self) -> None:
        """Leave a block's experts as they are; refuse quantized ones."""
        self._summary.has_experts = True
        for name in self.schema.linears:
            if "experts" in name.split("."):
                refuse(
                    f"{name}: quantized experts cannot be served yet; `tacq quantize` "
                    "leaves them in 16 bits"
                )

    def _parts(self, prefix: str) -> list[str]:
        """Names of the linears that make up a module."""
        name = prefix.removeprefix(_DRAFT)
        if name in self._stored_names:
            # Fused in the file too, which the mapping of GLM-4 for one does not say.
            return [name]
        parent, _, leaf = name.rpartition(".")
        parts = (_FUSED | self.packed_modules_mapping).get(leaf, [leaf])
        return [f"{parent}.{part}" if parent else part for part in parts]
