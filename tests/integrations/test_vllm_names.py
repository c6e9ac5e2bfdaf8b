"""Which stored linears a module of vLLM's model is made of, by their names."""

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.models.utils import WeightsMapper

from tests.integrations.vllm_linears import GATE_UP, merged_layer, stored_linears

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("one_process")]


def test_fused_linears_of_a_model_that_does_not_say_so():
    """As StableLM."""
    config, _, _ = stored_linears(GATE_UP, 3, 32)
    config.packed_modules_mapping = {}
    assert merged_layer(config).quant_method.names == list(GATE_UP)


def test_half_quantized_fused_linears_are_refused():
    config, _, _ = stored_linears({"mlp.gate_proj": (128, 64)}, 3, 32)
    reason = r"tacq: mlp\.up_proj: not quantized, but mlp\.gate_proj"
    with pytest.raises(ValueError, match=reason):
        merged_layer(config)


@pytest.mark.parametrize("quantized", [True, False])
def test_experts_are_served_only_unquantized(quantized):
    name = "mlp.experts.0.gate_proj" if quantized else "mlp.shared_expert.gate_proj"
    config, _, _ = stored_linears({name: (128, 64)}, 3, 32)
    experts = RoutedExperts.__new__(RoutedExperts)
    if not quantized:
        assert config.get_quant_method(experts, "mlp.experts") is None
        return
    with pytest.raises(ValueError, match=r"tacq: mlp.experts.0.gate_proj: quantized"):
        config.get_quant_method(experts, "mlp.experts")


def test_names_follow_a_model_in_a_model():
    """As Gemma 3's: vLLM asks for the outer one, then for the inner one."""
    config, _, _ = stored_linears(GATE_UP, 3, 32)
    outer = WeightsMapper(orig_to_new_prefix={"mlp.": "language_model.mlp."})
    config.apply_vllm_mapper(outer)
    config.apply_vllm_mapper(WeightsMapper())
    layer = merged_layer(config, "language_model.mlp")
    assert layer.quant_method.names == list(GATE_UP)


def test_names_follow_a_model_that_renames_its_modules():
    config, _, _ = stored_linears(GATE_UP, 3, 32)
    mapper = WeightsMapper(orig_to_new_prefix={"mlp.": "model.language.mlp."})
    config.apply_vllm_mapper(mapper)
    config.apply_vllm_mapper(mapper)
    layer = merged_layer(config, "model.language.mlp")
    assert layer.quant_method.names == list(GATE_UP)
