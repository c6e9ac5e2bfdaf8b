import pytest
import torch
from torch import Tensor

from tacq_vllm.format.linear import PackedLinear, slice_columns
from tacq_vllm.kernels import ops
from tacq_vllm.kernels.ops import kernel_name, prepare, quantized_linear
from tacq_vllm.kernels.reference import linear_forward
from tests.builders import assert_is_product, random_input, random_linear


def op_arguments(
    x: Tensor, packed: PackedLinear, bias: Tensor | None
) -> tuple[Tensor | int | None, ...]:
    return (
        x,
        packed.qweight,
        packed.qweight_high,
        packed.scales,
        packed.qzeros,
        packed.qzeros_high,
        packed.outliers,
        bias,
        packed.bits,
    )


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("tokens", [0, 1, 8, 40])
def test_every_number_of_tokens(bits: int, tokens: int) -> None:
    packed, dense = random_linear(bits, 24, 64, 32, 0.03, torch.bfloat16, 0)
    x, bias = random_input(tokens, 64), random_input(24)

    assert_is_product(quantized_linear(x, packed, bias), x, dense, bias)


@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("in_features", [48, 64])
def test_without_numba_the_reference_serves(
    monkeypatch: pytest.MonkeyPatch, tokens: int, in_features: int
) -> None:
    monkeypatch.setattr(ops, "_kernels", lambda device_type: None)
    packed, _ = random_linear(3, 24, in_features, 16, 0.03, torch.float16, 1)
    x = random_input(tokens, in_features)

    out = quantized_linear(x, packed, None)

    assert torch.equal(out, linear_forward(x, packed, None))
    prepare(packed, torch.float32)


def test_the_name_of_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    packed, _ = random_linear(3, 24, 64, 32, 0.03, torch.bfloat16, 0)
    odd, _ = random_linear(3, 24, 48, 16, 0.03, torch.bfloat16, 0)

    if ops._kernels("cpu"):
        assert kernel_name(packed, torch.float32) == "cpu exact"
        assert kernel_name(packed, torch.bfloat16).startswith("cpu int8 ")
    assert kernel_name(odd, torch.bfloat16) == "reference"
    monkeypatch.setattr(ops, "_kernels", lambda device_type: None)
    assert kernel_name(packed, torch.bfloat16) == "reference"


def test_a_linear_cut_by_columns() -> None:
    packed, dense = random_linear(3, 24, 128, 32, 0.03, torch.float16, 2)
    x = random_input(2, 64)

    out = quantized_linear(x, slice_columns(packed, 64, 128), None)

    assert_is_product(out, x, dense[:, 64:])


@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize("shape", [(64,), (3, 64), (2, 20, 64), (0, 64)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_opcheck(bits: int, shape: tuple[int, ...], with_bias: bool) -> None:
    packed, _ = random_linear(bits, 24, 64, 32, 0.03, torch.bfloat16, 3)
    x = random_input(*shape)
    bias = random_input(24) if with_bias else None

    torch.library.opcheck(torch.ops.tacq.linear, op_arguments(x, packed, bias))


def test_compiles_without_graph_breaks() -> None:
    packed, _ = random_linear(3, 24, 64, 32, 0.03, torch.float16, 4)
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    @torch.compile(fullgraph=True, dynamic=True, backend=count)
    def step(x: Tensor) -> Tensor:
        return quantized_linear(x * 2, packed, None).relu()

    for tokens in (3, 5, 40):
        x = random_input(tokens, 64)
        assert torch.equal(step(x), quantized_linear(x * 2, packed, None).relu())
    assert len(graphs) == 1


def test_eager_backend_gives_the_same() -> None:
    packed, _ = random_linear(2, 24, 64, -1, 0.03, torch.bfloat16, 5)
    x = random_input(2, 64)
    compiled = torch.compile(quantized_linear, fullgraph=True, backend="eager")

    assert torch.equal(compiled(x, packed, None), quantized_linear(x, packed, None))
