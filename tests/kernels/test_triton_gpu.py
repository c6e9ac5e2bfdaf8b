"""What only a GPU can show of the Triton kernels."""

import pytest
import torch

from tacq_vllm.format.linear import PackedLinear
from tacq_vllm.kernels.ops import arrange, prepare, quantized_linear
from tests.builders import assert_is_product, random_input, random_linear

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

TOKENS = [1, 2, 8, 16, 40, 100, 200, 300]


def linear_on_gpu(bits: int, n: int, k: int, group_size: int) -> PackedLinear:
    packed, _ = random_linear(bits, n, k, group_size, 0.0035, torch.bfloat16, 0)
    return to_gpu(packed)


def to_gpu(packed: PackedLinear) -> PackedLinear:
    tensors = {name: tensor.cuda() for name, tensor in packed.tensors().items()}
    return PackedLinear.from_tensors(tensors, packed.bits, packed.in_features)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("shape", [(4096, 4096), (1024, 4096), (576, 1536)])
@pytest.mark.parametrize("x_dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_real_shapes(bits: int, shape: tuple[int, int], x_dtype: torch.dtype) -> None:
    packed, dense = random_linear(bits, *shape, 64, 0.0035, torch.bfloat16, 1)
    on_gpu, bias = to_gpu(packed), random_input(shape[0], dtype=x_dtype)
    arranged = arrange(on_gpu, x_dtype)

    for tokens in TOKENS:
        x = random_input(tokens, shape[1], dtype=x_dtype)
        for linear in (on_gpu, arranged):
            out = quantized_linear(x.cuda(), linear, linear.layout, bias.cuda())
            assert_is_product(out.cpu(), x, dense, bias)


@pytest.mark.parametrize("tokens", TOKENS)
def test_bits_are_the_same_from_run_to_run(tokens: int) -> None:
    packed = arrange(linear_on_gpu(3, 4096, 4096, 64), torch.bfloat16)
    x = random_input(tokens, 4096, dtype=torch.bfloat16).cuda()
    first = quantized_linear(x, packed, packed.layout, None)

    assert all(
        torch.equal(first, quantized_linear(x, packed, packed.layout, None))
        for _ in range(20)
    )


@pytest.mark.parametrize("tokens", TOKENS)
def test_waits_for_the_kernel_that_writes_x(tokens: int) -> None:
    weights = [
        arrange(linear_on_gpu(3, 4096, 4096, 64), torch.bfloat16) for _ in range(4)
    ]
    x = random_input(tokens, 4096, dtype=torch.bfloat16).cuda()
    prepare(weights[0], torch.bfloat16, None)
    expected = quantized_linear(x, weights[0], weights[0].layout, None)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = [
            quantized_linear(x.neg_(), weight, weight.layout, None)
            for weight in weights
        ]

    for _ in range(20):
        graph.replay()
        for number, out in enumerate(outs):
            assert torch.equal(out, expected if number % 2 else -expected)


@pytest.mark.parametrize("tokens", TOKENS)
def test_runs_in_a_cuda_graph(tokens: int) -> None:
    packed = arrange(linear_on_gpu(3, 4096, 4096, 64), torch.bfloat16)
    prepare(packed, torch.bfloat16, None)
    x = torch.zeros(tokens, 4096, dtype=torch.bfloat16, device="cuda")
    quantized_linear(x, packed, packed.layout, None)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = quantized_linear(x, packed, packed.layout, None)

    for seed in (1, 2):
        torch.manual_seed(seed)
        x.copy_(torch.randn(tokens, 4096))
        graph.replay()
        assert torch.equal(out, quantized_linear(x, packed, packed.layout, None))


def test_compiles_without_graph_breaks() -> None:
    packed = arrange(linear_on_gpu(2, 1024, 4096, -1), torch.bfloat16)
    step = torch.compile(
        lambda x: quantized_linear(x * 2, packed, packed.layout, None).relu(),
        fullgraph=True,
    )

    for tokens in (1, 5, 40):
        x = random_input(tokens, 4096, dtype=torch.bfloat16).cuda()
        expected = quantized_linear(x * 2, packed, packed.layout, None).relu()
        torch.testing.assert_close(step(x), expected)
