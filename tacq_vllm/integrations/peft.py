"""LoRA adapters of PEFT on top of packed linears.

PEFT knows `nn.Linear`; other modules are named to it in each LoRA configuration:

    config = with_packed_linears(LoraConfig(target_modules=["q_proj", "v_proj"]))
    model = get_peft_model(model, config)

The packed weights stay as they are: an adapter is trained, saved and loaded, and never
merged into them.
"""

from typing import Any, NoReturn

from peft import LoraConfig
from peft.tuners.lora import Linear
from torch import nn

from tacq_vllm.layers import TacqLinear


class TacqLoraLinear(Linear):
    """An adapter beside a `TacqLinear`."""

    @property
    def lora_variants(self) -> dict[tuple[str, ...], Any]:
        """Plain LoRA alone: the others (DoRA, PiSSA) read or change the weight."""
        return {(): None}

    def merge(
        self, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> NoReturn:
        """Refuse, for a packed weight cannot take the sum.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            "an adapter cannot be merged into packed weights: load it on "
            "`model.dequantize()` and merge it there"
        )

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        base = self.get_base_layer()
        return base.in_features, base.out_features


def with_packed_linears(config: LoraConfig) -> LoraConfig:
    """Let a configuration make adapters for packed linears too; give it back."""
    config._register_custom_module({TacqLinear: TacqLoraLinear})
    return config
