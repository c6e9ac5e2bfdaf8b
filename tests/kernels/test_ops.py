import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear as dense_linear

from tacq_vllm.format.linear import PackedLinear
from tacq_vllm.kernels import ops
from tacq_vllm.kernels.ops import kernel_name, prepare, quantized_linear
from tacq_vllm.kernels.reference import linear_forward
from tests.builders import assert_is_product, random_input, random_linear
from tests.clusters import random_clustered
from tests.cuts import slice_columns


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

    assert_is_product(quantized_linear(x, packed, packed.layout, bias), x, dense, bias)


@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("in_features", [48, 64])
def test_without_numba_the_reference_serves(
    monkeypatch: pytest.MonkeyPatch, tokens: int, in_features: int
) -> None:
    monkeypatch.setattr(ops, "_kernels", lambda device_type: None)
    packed, _ = random_linear(3, 24, in_features, 16, 0.03, torch.float16, 1)
    x = random_input(tokens, in_features)

    out = quantized_linear(x, packed, packed.layout, None)

    assert torch.equal(out, linear_forward(x, packed, None))
    prepare(packed, torch.float32, None)


def test_the_name_of_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    packed, _ = random_linear(3, 24, 64, 32, 0.03, torch.bfloat16, 0)
    odd, _ = random_linear(3, 24, 48, 16, 0.03, torch.bfloat16, 0)

    if ops._kernels("cpu"):
        assert kernel_name(packed, torch.float32) == "cpu exact"
        assert kernel_name(packed, torch.bfloat16).startswith("cpu int8 ")
    assert kernel_name(odd, torch.bfloat16) == "reference"
    monkeypatch.setattr(ops, "_kernels", lambda device_type: None)
    assert kernel_name(packed, torch.bfloat16) == "reference"


def test_where_there_are_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    find = ops._kernels.__wrapped__

    assert find("mps") is None
    with monkeypatch.context() as patch:
        patch.setattr(ops.platform, "machine", lambda: "aarch64")
        assert find("cpu") is None
    with monkeypatch.context() as patch:
        # As in a build for AMD's GPUs, which calls its devices so too.
        patch.setattr(torch.version, "cuda", None)
        assert find("cuda") is None
    with monkeypatch.context() as patch:
        patch.setattr(torch.version, "cuda", "13.0")
        patch.setattr(ops, "_installed", lambda package: False)
        assert find("cpu") is None
        assert find("cuda") is None


def test_without_openmp_the_reference_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu_linear = pytest.importorskip("tacq_vllm.kernels.cpu_linear")
    monkeypatch.setattr(cpu_linear, "find_openmp", lambda: None)

    assert ops._kernels.__wrapped__("cpu") is None


@pytest.mark.parametrize("shape", [(100,), (3, 100), (2, 20, 100), (0, 100)])
def test_clusters(shape: tuple[int, ...]) -> None:
    packed, dense = random_clustered(24, 100, -1, 0.03, torch.bfloat16, 0)
    x, bias = (random_input(*s).requires_grad_() for s in (shape, (24,)))
    grad = random_input(*shape[:-1], 24)

    out = quantized_linear(x, packed, packed.layout, bias)
    out.backward(grad)

    assert_is_product(out.detach(), x.detach(), dense, bias.detach())
    assert_is_product(x.grad, grad, dense.T)
    torch.testing.assert_close(bias.grad, grad.reshape(-1, 24).sum(0))
    arguments = (x, packed.qweight, packed.scales, packed.outliers, bias)
    torch.library.opcheck(torch.ops.tacq.clustered_linear, arguments)


def test_a_linear_cut_by_columns() -> None:
    packed, dense = random_linear(3, 24, 128, 32, 0.03, torch.float16, 2)
    part = slice_columns(packed, 64, 128)
    x = random_input(2, 64)

    out = quantized_linear(x, part, part.layout, None)

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
        return quantized_linear(x * 2, packed, packed.layout, None).relu()

    for tokens in (3, 5, 40):
        x = random_input(tokens, 64)
        assert torch.equal(
            step(x), quantized_linear(x * 2, packed, packed.layout, None).relu()
        )
    assert len(graphs) == 1


def test_eager_backend_gives_the_same() -> None:
    packed, _ = random_linear(2, 24, 64, -1, 0.03, torch.bfloat16, 5)
    x = random_input(2, 64)
    compiled = torch.compile(quantized_linear, fullgraph=True, backend="eager")

    assert torch.equal(
        compiled(x, packed, packed.layout, None),
        quantized_linear(x, packed, packed.layout, None),
    )


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("shape", [(64,), (3, 64), (2, 20, 64), (0, 64)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_gradients_are_those_of_the_dense_linear(
    bits: int, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    packed, dense = random_linear(bits, 24, 64, 32, 0.03, torch.bfloat16, 6)
    x, bias = random_input(*shape, dtype=dtype), random_input(24, dtype=dtype)
    grad = random_input(*shape[:-1], 24, dtype=dtype)
    inputs = [tensor.clone().requires_grad_() for tensor in (x, bias)]
    expected = [tensor.double().requires_grad_() for tensor in (x, bias)]

    quantized_linear(inputs[0], packed, packed.layout, inputs[1]).backward(grad)

    dense_linear(expected[0], dense, expected[1]).backward(grad.double())
    for tensor, other in zip(inputs, expected, strict=True):
        assert tensor.grad.dtype == dtype
        torch.testing.assert_close(
            tensor.grad.double(), other.grad, rtol=1e-5, atol=1e-5
        )


def test_gradient_in_16_bits() -> None:
    packed, dense = random_linear(3, 24, 64, 32, 0.03, torch.bfloat16, 7)
    x = random_input(3, 64, dtype=torch.bfloat16).requires_grad_()
    grad = random_input(3, 24, dtype=torch.bfloat16)

    quantized_linear(x, packed, packed.layout, None).backward(grad)

    assert_is_product(x.grad, grad, dense.T)


def test_without_gradients_none_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    packed, _ = random_linear(3, 24, 64, 32, 0.03, torch.bfloat16, 8)
    bias = random_input(24).requires_grad_()
    monkeypatch.setattr(ops, "linear_backward", None)
    if ops._kernels("cpu"):
        monkeypatch.setattr(ops._kernels("cpu"), "backward", None)

    assert not quantized_linear(
        random_input(3, 64), packed, packed.layout, None
    ).requires_grad
    quantized_linear(random_input(3, 64), packed, packed.layout, bias).sum().backward()

    assert torch.equal(bias.grad, torch.full((24,), 3.0))


@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize("shape", [(64,), (2, 20, 64)])
def test_opcheck_with_gradients(bits: int, shape: tuple[int, ...]) -> None:
    packed, _ = random_linear(bits, 24, 64, 32, 0.03, torch.bfloat16, 9)
    x, bias = random_input(*shape).requires_grad_(), random_input(24).requires_grad_()

    torch.library.opcheck(torch.ops.tacq.linear, op_arguments(x, packed, bias))
