import pytest

from tacq_vllm.format.clustered import ClusteredLayout
from tacq_vllm.format.linear import PlanesLayout
from tacq_vllm.format.parallel import (
    fused_modules,
    half_quantized,
    tensor_parallel_sizes,
)

PLANES = PlanesLayout(3)


def llama(
    hidden: int, intermediate: int, head: int, heads: int, kv_heads: int
) -> dict[str, tuple[int, int]]:
    """Shapes of a block of a Llama."""
    return {
        "model.layers.0.self_attn.q_proj": (heads * head, hidden),
        "model.layers.0.self_attn.k_proj": (kv_heads * head, hidden),
        "model.layers.0.self_attn.v_proj": (kv_heads * head, hidden),
        "model.layers.0.self_attn.o_proj": (hidden, heads * head),
        "model.layers.0.mlp.gate_proj": (intermediate, hidden),
        "model.layers.0.mlp.up_proj": (intermediate, hidden),
        "model.layers.0.mlp.down_proj": (hidden, intermediate),
    }


def fused(linears: dict[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """The same block with q, k, v and gate, up in one linear each, as in Phi-3."""
    rows = {name.rpartition(".")[2]: out for name, (out, _) in linears.items()}
    hidden = linears["model.layers.0.self_attn.q_proj"][1]
    return {
        "self_attn.qkv_proj": (sum(rows[f"{c}_proj"] for c in "qkv"), hidden),
        "mlp.gate_up_proj": (rows["gate_proj"] + rows["up_proj"], hidden),
        "self_attn.o_proj": linears["model.layers.0.self_attn.o_proj"],
        "mlp.down_proj": linears["model.layers.0.mlp.down_proj"],
    }


@pytest.mark.parametrize(
    ("linears", "group_size", "heads", "kv_heads", "sizes"),
    [
        # Llama 3 8B: from 8 ranks on each head of k and v is shared.
        (llama(4096, 14336, 128, 32, 8), 64, 32, 8, (1, 2, 4, 8, 16, 32)),
        # Its groups of 512 columns end where a rank has 1792 or fewer.
        (llama(4096, 14336, 128, 32, 8), 512, 32, 8, (1, 2, 4)),
        # SmolLM2 135M: nine heads.
        (llama(576, 1536, 64, 9, 3), 64, 9, 3, (1, 3)),
        # Whole rows have no groups to cut through.
        (llama(512, 1376, 64, 8, 8), -1, 8, 8, (1,)),
        (llama(512, 1408, 64, 8, 8), -1, 8, 8, (1, 2, 4)),
        # Four heads could share three of k and v in no way.
        (llama(256, 768, 64, 12, 3), 32, 12, 3, (1, 3, 6, 12)),
        # Heads of 16 rows: two of them fill a word.
        (llama(64, 128, 16, 4, 2), 32, 4, 2, (1,)),
        (llama(64, 128, 16, 4, 4), 32, 4, 4, (1, 2)),
        # One such head of k and v does not.
        (llama(64, 128, 16, 4, 1), 32, 4, 1, ()),
    ],
)
def test_sizes(linears, group_size, heads, kv_heads, sizes):
    for stored in (linears, fused(linears)):
        found = tensor_parallel_sizes(stored, group_size, heads, kv_heads, PLANES)
        assert found == sizes


def test_what_is_left_out_of_a_quantized_module_is_named_once():
    names = [name for name in llama(64, 128, 16, 4, 2) if "down_proj" not in name]
    qkv, o, gate_up = fused_modules(reversed(names))[::-1]
    assert (len(qkv), len(o), len(gate_up)) == (3, 1, 2)

    quantized = {name for name in names if "v_proj" not in name}
    (fault,) = half_quantized(qkv, quantized)
    assert fault.startswith("model.layers.0.self_attn.v_proj: not quantized, but ")
    assert half_quantized(gate_up, quantized) == half_quantized(o, set()) == ()


def test_an_unknown_linear_may_be_cut_in_any_way():
    linears = llama(512, 1408, 64, 8, 8) | {"self_attn.kv_a_proj": (64, 512)}
    assert tensor_parallel_sizes(linears, 32, 8, 8, PLANES) is None


@pytest.mark.parametrize(
    ("linears", "group_size", "heads", "kv_heads", "sizes"),
    [
        # Half of 4096 columns is no multiple of 96.
        (llama(4096, 14336, 128, 32, 8), -1, 32, 8, (1,)),
        (llama(576, 1536, 64, 9, 3), -1, 9, 3, (1,)),
        (llama(768, 1536, 64, 12, 4), -1, 12, 4, (1, 2, 4)),
        (llama(768, 1536, 64, 12, 4), 192, 12, 4, (1, 2, 4)),
        (llama(768, 1536, 64, 12, 4), 384, 12, 4, (1, 2)),
        # Rows have no words to cut through: a head of k and v may have 48.
        (llama(192, 384, 48, 4, 1), -1, 4, 1, (1, 2)),
    ],
)
def test_sizes_of_clusters(linears, group_size, heads, kv_heads, sizes):
    for stored in (linears, fused(linears)):
        found = tensor_parallel_sizes(
            stored, group_size, heads, kv_heads, ClusteredLayout()
        )
        assert found == sizes
