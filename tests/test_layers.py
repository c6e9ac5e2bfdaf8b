"""The module of a quantized linear, in the order of its device and as it is stored."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from tacq_vllm.format.clustered import ClusteredLinear
from tacq_vllm.format.linear import PackedLinear
from tacq_vllm.format.stored import TensorSpec
from tacq_vllm.kernels.tiles import TiledLinear
from tacq_vllm.kernels.tiling import tile
from tacq_vllm.layers import TacqLinear
from tests.arranged import arrange_on_cpu
from tests.builders import assert_is_product, random_input, random_linear
from tests.clusters import random_clustered

HALF = torch.bfloat16


@pytest.fixture
def arranging(monkeypatch: pytest.MonkeyPatch) -> None:
    arrange_on_cpu(monkeypatch)


def module_of(
    packed: PackedLinear | ClusteredLinear, bias: Tensor | None = None
) -> TacqLinear:
    specs = {n: TensorSpec(t.dtype, t.shape) for n, t in packed.tensors().items()}
    parameter = None if bias is None else nn.Parameter(torch.zeros_like(bias))
    module = TacqLinear(specs, packed.layout, packed.in_features, parameter)
    state = {n: t.clone() for n, t in packed.tensors().items()}
    module.load_state_dict(state if bias is None else state | {"bias": bias})
    return module


def assert_stores(module: TacqLinear, packed: PackedLinear | ClusteredLinear) -> None:
    stored, state = packed.tensors(), module.state_dict()
    assert state.keys() - {"bias"} == stored.keys()
    assert all(torch.equal(state[name], stored[name]) for name in stored)
    assert state["scales"].dtype == packed.scales.dtype


@pytest.fixture(params=[2, 3, 4])
def packed(request: pytest.FixtureRequest) -> PackedLinear:
    return random_linear(request.param, 40, 512, 64, 0.02, HALF, 0)[0]


@pytest.mark.usefixtures("arranging")
def test_what_is_stored_stays(packed: PackedLinear) -> None:
    bias = random_input(40, dtype=HALF)
    module, x = module_of(packed, bias), random_input(3, 512, dtype=HALF)

    module.arrange(HALF)

    assert isinstance(module.held, TiledLinear)
    assert not hasattr(module, "scales")
    assert_stores(module, packed)
    assert torch.equal(module.state_dict()["bias"], bias)
    assert_is_product(module(x), x, module.dequantize(torch.float64), bias)
    held = module.held
    module.arrange(HALF)
    for name, tensor in held.tensors().items():
        assert module.held.tensors()[name] is tensor, name


@pytest.mark.usefixtures("arranging")
def test_another_state_is_loaded(packed: PackedLinear) -> None:
    other, _ = random_linear(packed.bits, 40, 512, 64, 0, HALF, 1)
    other = replace(other, outliers=packed.outliers)
    module = module_of(packed)
    module.arrange(HALF)

    module.load_state_dict(other.tensors())

    assert isinstance(module.held, TiledLinear)
    assert_stores(module, other)
    with pytest.raises(RuntimeError, match="scales"):
        module.load_state_dict(other.tensors() | {"scales": torch.zeros(3, 3)})
    assert_stores(copy.deepcopy(module), other)


@pytest.mark.usefixtures("arranging")
def test_moved_and_converted(packed: PackedLinear) -> None:
    module = nn.Sequential(module_of(packed))
    (linear,) = module
    linear.arrange(HALF)

    for dtype in (torch.float16, HALF, torch.float16):
        module.to(dtype)
        assert isinstance(linear.held, TiledLinear)
        assert_stores(linear, packed)
    module.float()
    assert isinstance(linear.held, PackedLinear)
    assert_stores(linear, packed)
    module.half()
    assert isinstance(linear.held, TiledLinear)
    module.to("meta")
    assert isinstance(linear.held, PackedLinear)
    assert linear.scales.is_meta
    assert linear.scales.dtype == HALF


@pytest.mark.usefixtures("arranging")
def test_other_types_of_x_are_taken(packed: PackedLinear) -> None:
    module, x = module_of(packed), random_input(3, 512)
    module.arrange(HALF)

    out = module(x)

    assert out.dtype == torch.float32
    assert_is_product(out, x, module.dequantize(torch.float64))
    assert_stores(module, packed)
    assert module(x.half()).dtype == torch.float16


@pytest.mark.usefixtures("arranging")
@pytest.mark.parametrize("shape", [(512,), (3, 512), (2, 20, 512), (0, 512)])
def test_gradients(packed: PackedLinear, shape: tuple[int, ...]) -> None:
    module = module_of(packed, random_input(40, dtype=HALF))
    module.arrange(HALF)
    x = random_input(*shape, dtype=HALF).requires_grad_()
    grad = random_input(*shape[:-1], 40, dtype=HALF)

    module(x).backward(grad)

    assert isinstance(module.held, TiledLinear)
    assert_is_product(x.grad, grad, module.dequantize(torch.float64).T)
    sums = grad.reshape(-1, 40).float().sum(0)
    torch.testing.assert_close(module.bias.grad.float(), sums, atol=0.1, rtol=0.02)


@pytest.mark.usefixtures("arranging")
def test_compiles_without_graph_breaks(packed: PackedLinear) -> None:
    module, x = module_of(packed), random_input(3, 512, dtype=HALF)
    module.arrange(HALF)
    compiled = torch.compile(module, fullgraph=True, backend="eager")

    assert torch.equal(compiled(x), module(x))


def test_the_op_of_tiles(packed: PackedLinear) -> None:
    tiled = tile(packed)
    x, bias = random_input(3, 512, dtype=HALF), random_input(40, dtype=HALF)
    kept = (tiled.segment_starts, tiled.segment_columns, tiled.segments)
    jobs = (tiled.job_starts, tiled.job_blocks, tiled.counters)

    for tracked in (False, True):
        inputs = (x.requires_grad_(tracked), bias.requires_grad_(tracked))
        weight = (tiled.qweight, tiled.grid, *kept, *jobs)
        arguments = (inputs[0], *weight, inputs[1], tiled.bits, HALF)
        torch.library.opcheck(torch.ops.tacq.tiled_linear, arguments)


@pytest.mark.usefixtures("arranging")
def test_clusters_stay_as_they_are_stored() -> None:
    clustered, dense = random_clustered(40, 960, -1, 0.02, HALF, 2)
    module, x = module_of(clustered), random_input(3, 960, dtype=HALF)
    module.arrange(HALF)

    module.half()

    assert isinstance(module.held, ClusteredLinear)
    assert_stores(module, clustered)
    assert_is_product(module(x), x, dense)


def test_on_a_cpu_weights_are_held_as_they_are_stored(packed: PackedLinear) -> None:
    module = module_of(packed)
    module.arrange(HALF)

    assert isinstance(module.held, PackedLinear)
    assert_stores(module, packed)
