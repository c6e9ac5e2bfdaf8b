"""Loading into vLLM's linears, on every rank of a mocked tensor-parallel group."""

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed")

from torch import nn
from vllm.config import LoadConfig, VllmConfig, set_current_vllm_config
from vllm.model_executor import parameter as vllm_parameter
from vllm.model_executor.layers import linear as vllm_linear
from vllm.model_executor.layers.quantization.utils.quant_utils import (
    get_and_maybe_dequant_weights,
)
from vllm.model_executor.model_loader.weight_utils import (
    initialize_single_dummy_weight,
)
from vllm.utils.torch_utils import set_default_torch_dtype

from tacq_vllm.kernels.reference import dequantize
from tests.integrations.vllm_linears import (
    CLUSTERS,
    GATE_UP,
    load,
    merged_layer,
    stored_linears,
)

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("one_process")]

HEAD = 32
HIDDEN = 192
INNER = 768


@pytest.fixture
def as_rank(monkeypatch):
    def pretend(rank: int, size: int) -> None:
        for module in (vllm_linear, vllm_parameter):
            name = "get_tensor_model_parallel_rank"
            monkeypatch.setattr(module, name, lambda: rank)
            name = "get_tensor_model_parallel_world_size"
            monkeypatch.setattr(module, name, lambda: size)

    return pretend


def loaded_weight(layer: nn.Module) -> torch.Tensor:
    layer.quant_method.process_weights_after_loading(layer)
    return dequantize(layer.quant_method._packed(layer), torch.float64)


GRIDS = [(2, 32), (3, 32), (3, -1), (4, 64), (CLUSTERS, -1), (CLUSTERS, 96)]


@pytest.mark.parametrize(("bits", "group_size"), GRIDS)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_qkv_with_replicated_heads(as_rank, bits, group_size, size):
    shapes = {
        "attn.q_proj": (4 * HEAD, HIDDEN),
        "attn.k_proj": (2 * HEAD, HIDDEN),
        "attn.v_proj": (2 * HEAD, HIDDEN),
    }
    config, packed, dense = stored_linears(shapes, bits, group_size)
    for rank in range(size):
        as_rank(rank, size)
        layer = vllm_linear.QKVParallelLinear(
            HIDDEN, HEAD, 4, 2, bias=False, quant_config=config, prefix="attn.qkv_proj"
        )
        for shard_id, name in zip("qkv", shapes, strict=True):
            load(layer, packed[name], shard_id)
        queries = 4 // size * HEAD
        kv_heads = max(1, 2 // size)
        kv_rank = rank // max(1, size // 2)
        parts = [dense["attn.q_proj"][rank * queries : (rank + 1) * queries]]
        for name in ("attn.k_proj", "attn.v_proj"):
            start = kv_rank * kv_heads * HEAD
            parts.append(dense[name][start : start + kv_heads * HEAD])
        assert torch.equal(loaded_weight(layer), torch.cat(parts))


@pytest.mark.parametrize(("bits", "group_size"), GRIDS)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_merged_columns_and_rows(as_rank, bits, group_size, size):
    shapes = {
        "mlp.gate_proj": (INNER, HIDDEN),
        "mlp.up_proj": (INNER, HIDDEN),
        "mlp.down_proj": (HIDDEN, INNER),
    }
    config, packed, dense = stored_linears(shapes, bits, group_size)
    cut = INNER // size
    for rank in range(size):
        as_rank(rank, size)
        mine = slice(rank * cut, (rank + 1) * cut)
        fused = vllm_linear.MergedColumnParallelLinear(
            HIDDEN,
            [INNER, INNER],
            bias=False,
            quant_config=config,
            prefix="mlp.gate_up_proj",
        )
        load(fused, packed["mlp.gate_proj"], 0)
        load(fused, packed["mlp.up_proj"], 1)
        expected = [dense["mlp.gate_proj"][mine], dense["mlp.up_proj"][mine]]
        assert torch.equal(loaded_weight(fused), torch.cat(expected))

        down = vllm_linear.RowParallelLinear(
            INNER, HIDDEN, bias=False, quant_config=config, prefix="mlp.down_proj"
        )
        load(down, packed["mlp.down_proj"], None)
        assert torch.equal(loaded_weight(down), dense["mlp.down_proj"][:, mine])


@pytest.mark.parametrize(("bits", "group_size"), GRIDS)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_linears_that_the_file_has_fused(as_rank, bits, group_size, size):
    """Each part is cut for itself, whether vLLM's mapping knows (Phi-3's) or not."""
    heads, kv_heads = 4, 2
    parts = [heads * HEAD, kv_heads * HEAD, kv_heads * HEAD]
    shapes = {"attn.qkv_proj": (sum(parts), HIDDEN), "mlp.gate_up_proj": (512, HIDDEN)}
    config, packed, dense = stored_linears(shapes, bits, group_size)
    config.packed_modules_mapping["qkv_proj"] = ["qkv_proj"]
    q, k, v = dense["attn.qkv_proj"].split(parts)
    gate, up = dense["mlp.gate_up_proj"].chunk(2)
    for rank in range(size):
        as_rank(rank, size)
        qkv = vllm_linear.QKVParallelLinear(
            HIDDEN,
            HEAD,
            heads,
            kv_heads,
            bias=False,
            quant_config=config,
            prefix="attn.qkv_proj",
        )
        load(qkv, packed["attn.qkv_proj"], None)
        kv_cuts = min(size, kv_heads)
        kv_rank = rank * kv_cuts // size
        expected = [part.chunk(kv_cuts)[kv_rank] for part in (k, v)]
        assert torch.equal(
            loaded_weight(qkv), torch.cat([q.chunk(size)[rank], *expected])
        )

        gate_up = vllm_linear.MergedColumnParallelLinear(
            HIDDEN, [256, 256], bias=False, quant_config=config, prefix=list(shapes)[1]
        )
        load(gate_up, packed["mlp.gate_up_proj"], None)
        expected = [part.chunk(size)[rank] for part in (gate, up)]
        assert torch.equal(loaded_weight(gate_up), torch.cat(expected))


@pytest.mark.parametrize("size", [1, 2])
def test_some_parts_fused_in_the_file(as_rank, size):
    shapes = {"in_proj_ab": (64 + 128, HIDDEN), "in_proj_c": (256, HIDDEN)}
    config, packed, dense = stored_linears(shapes, 3, 32)
    config.packed_modules_mapping = {"in_proj": list(shapes)}
    parts = [*dense["in_proj_ab"].split([64, 128]), dense["in_proj_c"]]
    for rank in range(size):
        as_rank(rank, size)
        layer = vllm_linear.MergedColumnParallelLinear(
            HIDDEN, [64, 128, 256], bias=False, quant_config=config, prefix="in_proj"
        )
        load(layer, packed["in_proj_c"], 2)
        load(layer, packed["in_proj_ab"], (0, 1))
        expected = [part.chunk(size)[rank] for part in parts]
        assert torch.equal(loaded_weight(layer), torch.cat(expected))


@pytest.mark.parametrize(
    "shapes",
    [
        {"mlp.gate_proj": (128, 64), "mlp.up_proj": (96, 64)},
        {"mlp.gate_proj": (128, 64), "mlp.up_proj": (128, 32)},
        {"mlp.gate_proj": (128, 64), "mlp.up_proj": (160, 64)},
    ],
)
def test_other_sizes_than_the_models_are_refused(shapes):
    config, _, _ = stored_linears(shapes, 3, 32)
    with pytest.raises(ValueError, match=r"tacq: .*stored as \[.*, but the model has"):
        merged_layer(config)


def test_a_part_that_no_stored_linear_holds_is_refused():
    config, _, _ = stored_linears(GATE_UP, 3, 32)
    with pytest.raises(ValueError, match=r"parts of \[128, 128, 64\] output features"):
        vllm_linear.MergedColumnParallelLinear(
            64,
            [128, 128, 64],
            bias=False,
            quant_config=config,
            prefix="mlp.gate_up_proj",
        )


def test_replicated_and_column_parallel_linears(as_rank):
    config, packed, dense = stored_linears({"router": (96, 64)}, 3, 32)
    as_rank(1, 2)
    replicated = vllm_linear.ReplicatedLinear(
        64, 96, bias=False, quant_config=config, prefix="router"
    )
    load(replicated, packed["router"], None)
    assert torch.equal(loaded_weight(replicated), dense["router"])

    config, packed, dense = stored_linears({"router": (128, 64)}, 3, 32)
    column = vllm_linear.ColumnParallelLinear(
        64, 128, bias=False, quant_config=config, prefix="router"
    )
    load(column, packed["router"], None)
    assert torch.equal(loaded_weight(column), dense["router"][64:])


def test_linears_of_latent_attention(as_rank):
    """As DeepSeek's: fused ones that no rank cuts, and one that attention reads."""
    fused = {"attn.q_a_proj": (96, HIDDEN), "attn.kv_a_proj_with_mqa": (64, HIDDEN)}
    config, packed, dense = stored_linears(fused | {"attn.kv_b_proj": (128, 64)}, 3, 32)
    leaves = [name.removeprefix("attn.") for name in fused]
    config.packed_modules_mapping = {"fused_qkv_a_proj": leaves}
    as_rank(1, 2)
    down = vllm_linear.MergedColumnParallelLinear(
        HIDDEN,
        [96, 64],
        bias=False,
        quant_config=config,
        prefix="attn.fused_qkv_a_proj",
        disable_tp=True,
    )
    for shard_id, name in enumerate(fused):
        load(down, packed[name], shard_id)
    assert torch.equal(loaded_weight(down), torch.cat([dense[name] for name in fused]))

    up = vllm_linear.ColumnParallelLinear(
        64, 128, bias=False, quant_config=config, prefix="attn.kv_b_proj"
    )
    load(up, packed["attn.kv_b_proj"], None)
    weight = loaded_weight(up)
    assert torch.equal(weight, dense["attn.kv_b_proj"][64:])
    assert torch.equal(get_and_maybe_dequant_weights(up).double(), weight)


@pytest.mark.parametrize("left_out", ["qweight_high", "scales", "qzeros", "outliers"])
def test_a_tensor_that_did_not_come_is_named(left_out):
    config, packed, _ = stored_linears(GATE_UP, 3, 32)
    layer = merged_layer(config)
    load(layer, packed["mlp.gate_proj"], 0)
    for name, tensor in packed["mlp.up_proj"].tensors().items():
        if name != left_out:
            parameter = getattr(layer, name)
            parameter.weight_loader(parameter, tensor, 1)
    with pytest.raises(ValueError, match=f"tacq: .*1 of 2 parts of {left_out}"):
        layer.quant_method.process_weights_after_loading(layer)


def test_bad_tables_and_scales_are_refused():
    config, packed, _ = stored_linears(GATE_UP, 3, 32)
    layer = merged_layer(config)
    table = packed["mlp.gate_proj"].outliers.clone()
    table[0] = 7
    with pytest.raises(ValueError, match=r"tacq: mlp.gate_proj.outliers: row offsets"):
        layer.outliers.weight_loader(layer.outliers, table, 0)
    none_kept = torch.zeros(129, dtype=torch.int32)
    with pytest.raises(
        ValueError, match=r"tacq: mlp.gate_proj.outliers: has 129 words"
    ):
        layer.outliers.weight_loader(layer.outliers, none_kept, 0)

    layer = merged_layer(config)
    packed["mlp.up_proj"].scales[3, 1] = torch.nan
    load(layer, packed["mlp.gate_proj"], 0)
    load(layer, packed["mlp.up_proj"], 1)
    with pytest.raises(ValueError, match=r"tacq: mlp.up_proj.scales: a value is not"):
        layer.quant_method.process_weights_after_loading(layer)


def test_cuts_through_words_or_groups_are_refused(as_rank):
    config, _, _ = stored_linears({"down": (64, 192)}, 3, 64)
    as_rank(0, 2)
    with pytest.raises(ValueError, match="tacq: down: tensor parallelism leaves 96"):
        vllm_linear.RowParallelLinear(
            192, 64, bias=False, quant_config=config, prefix="down"
        )


@pytest.mark.parametrize("size", [1, 2])
def test_cuts_through_words_of_rows_are_refused(as_rank, size):
    """On one rank too: rows of a word would be those of both parts."""
    shapes = {"mlp.gate_proj": (48, 64), "mlp.up_proj": (48, 64)}
    config, _, _ = stored_linears(shapes, 3, 32)
    as_rank(0, size)
    rows = 48 // size
    with pytest.raises(
        ValueError, match=rf"\[{rows}, {rows}\] output features on a ran"
    ):
        vllm_linear.MergedColumnParallelLinear(
            64, [48, 48], bias=False, quant_config=config, prefix="mlp.gate_up_proj"
        )


def test_weights_that_the_models_type_cannot_hold_are_refused():
    config, packed, _ = stored_linears(GATE_UP, 3, 32)
    packed["mlp.up_proj"].scales.fill_(6e4)
    with set_default_torch_dtype(torch.float16):
        layer = merged_layer(config)
    load(layer, packed["mlp.gate_proj"], 0)
    load(layer, packed["mlp.up_proj"], 1)
    with pytest.raises(ValueError, match=r"up_proj: scales: .* load the model in"):
        layer.quant_method.process_weights_after_loading(layer)


def test_clusters_are_cut_between_blocks(as_rank):
    config, _, _ = stored_linears({"down": (64, 288)}, CLUSTERS, -1)
    as_rank(0, 2)
    with pytest.raises(ValueError, match=r"leaves 144 .* cuts through words of 96"):
        vllm_linear.RowParallelLinear(
            288, 64, bias=False, quant_config=config, prefix="down"
        )


def test_clusters_of_any_number_of_rows_and_columns():
    shapes = {"mlp.gate_proj": (50, 100), "mlp.up_proj": (70, 100)}
    config, packed, dense = stored_linears(shapes, CLUSTERS, -1)
    layer = vllm_linear.MergedColumnParallelLinear(
        100, [50, 70], bias=False, quant_config=config, prefix="mlp.gate_up_proj"
    )
    load(layer, packed["mlp.gate_proj"], 0)
    load(layer, packed["mlp.up_proj"], 1)
    assert torch.equal(loaded_weight(layer), torch.cat(list(dense.values())))
    x = torch.randn(3, 100, dtype=torch.float64).float()
    output, _ = layer(x)
    expected = x.double() @ torch.cat(list(dense.values())).T
    torch.testing.assert_close(output.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("bits", "group_size"), [(3, 32), (CLUSTERS, -1)])
def test_dummy_weights_are_a_valid_table_of_the_right_size(bits, group_size):
    shapes = {"mlp.gate_proj": (576, 64), "mlp.up_proj": (576, 64)}
    config, packed, _ = stored_linears(shapes, bits, group_size)
    dummy = VllmConfig(load_config=LoadConfig(load_format="dummy"))
    # As vLLM's loader does it: integers above 256 are not exact in this type.
    with set_current_vllm_config(dummy), set_default_torch_dtype(torch.bfloat16):
        layer = vllm_linear.MergedColumnParallelLinear(
            64, [576, 576], bias=False, quant_config=config, prefix="mlp.gate_up_proj"
        )
        for parameter in layer.parameters():
            initialize_single_dummy_weight(parameter)
        layer.quant_method.process_weights_after_loading(layer)
    stored = sum(p.outliers.numel() - 576 - 1 for p in packed.values())
    assert layer.outliers.numel() == 2 * 576 + 1 + stored
    output, _ = layer(torch.randn(3, 64))
    assert bool(output.isfinite().all())


@pytest.mark.parametrize(("bits", "group_size"), [(3, 32), (CLUSTERS, -1)])
def test_resident_bytes_are_those_stored(bits, group_size):
    config, packed, _ = stored_linears(GATE_UP, bits, group_size)
    layer = merged_layer(config)
    load(layer, packed["mlp.gate_proj"], 0)
    load(layer, packed["mlp.up_proj"], 1)
    layer.quant_method.process_weights_after_loading(layer)
    resident = sum(p.nbytes for p in layer.parameters())
    stored = sum(t.nbytes for p in packed.values() for t in p.tensors().values())
    # Fusing saves the second table's first row offset.
    assert resident == stored - 4
