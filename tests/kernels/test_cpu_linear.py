from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.builders import assert_is_product, random_input, random_linear
from tests.cuts import slice_columns, slice_rows
from tests.kernels.cases import uneven_outliers
from tests.kernels.cpu import OBSTACLE, assert_bits_are_fixed, assert_tokens_are_apart

if OBSTACLE is not None:
    pytest.skip(OBSTACLE, allow_module_level=True)

from tacq_vllm.kernels import cpu_exact
from tacq_vllm.kernels import cpu_linear as kernel
from tacq_vllm.kernels.cpu_chunks import chunk_reader
from tacq_vllm.kernels.cpu_exact import MAX_FUSED_TOKENS
from tacq_vllm.kernels.cpu_float_lanes import FloatLanes
from tacq_vllm.kernels.cpu_linear import backward, multiply, supports
from tacq_vllm.kernels.cpu_planes import planes_weight
from tacq_vllm.kernels.openmp import OpenMP

STORAGE_DTYPES = st.sampled_from([torch.float16, torch.bfloat16])
BITS = [2, 3, 4]


@pytest.fixture(autouse=True, scope="module")
def exact_activations() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "activations", lambda: "exact")
        yield


@given(
    bits=st.sampled_from(BITS),
    out_features=st.integers(1, 70),
    in_features=st.sampled_from([32, 64, 96, 160, 256]),
    group_size=st.sampled_from([-1, 16, 32]),
    density=st.floats(0, 0.05),
    dtype=STORAGE_DTYPES,
    x_dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    tokens=st.integers(1, 20),
    with_bias=st.booleans(),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=60)
def test_any_shape(
    bits: int,
    out_features: int,
    in_features: int,
    group_size: int,
    density: float,
    dtype: torch.dtype,
    x_dtype: torch.dtype,
    tokens: int,
    with_bias: bool,
    seed: int,
) -> None:
    packed, dense = random_linear(
        bits, out_features, in_features, group_size, density, dtype, seed
    )
    x = random_input(tokens, in_features, dtype=x_dtype)
    bias = random_input(out_features, dtype=x_dtype) if with_bias else None
    assert supports(packed, x.dtype)

    assert_is_product(multiply(x, packed, bias), x, dense, bias)
    grad = random_input(tokens, out_features, dtype=x_dtype)
    assert_is_product(backward(grad, packed), grad, dense.T)


@pytest.mark.parametrize(
    ("bits", "tokens", "in_features", "group_size"),
    [
        # Rows in several parts, the last chunk whole or not.
        (3, 1, 8960, -1),
        (2, 3, 4096, 512),
        (3, 8, 2400, 32),
        (4, 8, 1344, 64),
        # Groups that go across chunks.
        (3, 1, 96, 48),
        (4, 2, 960, 96),
        (2, 8, 1440, 480),
    ],
)
def test_parts_and_groups_of_a_row(
    bits: int, tokens: int, in_features: int, group_size: int
) -> None:
    packed, dense = random_linear(
        bits, 37, in_features, group_size, 0.02, torch.bfloat16, 11
    )
    x = random_input(tokens, in_features)

    assert_is_product(multiply(x, packed, None), x, dense)
    grad = random_input(tokens, 37)
    assert_is_product(backward(grad, packed), grad, dense.T)


@pytest.mark.parametrize("bits", BITS)
@uneven_outliers
def test_uneven_outliers(bits: int, density: float, rows: slice) -> None:
    packed, dense = random_linear(
        bits, 37, 64, 32, density, torch.bfloat16, 1, outlier_rows=rows
    )
    for tokens in (3, MAX_FUSED_TOKENS + 1):
        x = random_input(tokens, 64)
        assert_is_product(multiply(x, packed, None), x, dense)


@pytest.mark.parametrize("shape", [(64,), (1, 64), (2, 3, 64), (3, 1, 5, 64)])
def test_leading_dimensions(shape: tuple[int, ...]) -> None:
    packed, dense = random_linear(3, 21, 64, 32, 0.02, torch.float16, 2)
    x = random_input(*shape)

    assert_is_product(multiply(x, packed, None), x, dense)


@pytest.mark.parametrize(
    "view",
    [
        lambda: random_input(64, 5).T,
        lambda: random_input(5, 128)[:, ::2],
        lambda: random_input(5, 100)[:, 3:67],
        lambda: random_input(1, 64).expand(5, -1),
        lambda: random_input(3, 5, 64).transpose(0, 1),
    ],
    ids=["transposed", "strided", "offset", "expanded", "swapped"],
)
def test_inputs_that_are_not_contiguous(view) -> None:
    packed, dense = random_linear(2, 21, 64, -1, 0.02, torch.float16, 3)
    x = view()

    assert_is_product(multiply(x, packed, None), x, dense)


@pytest.mark.parametrize("block_weights", [1, 64, 7 * 64])
def test_blocks_of_any_size(
    monkeypatch: pytest.MonkeyPatch, block_weights: int
) -> None:
    packed, dense = random_linear(3, 50, 64, 16, 0.03, torch.float16, 10)
    x = random_input(MAX_FUSED_TOKENS + 1, 64)
    monkeypatch.setattr(cpu_exact, "BLOCK_WEIGHTS", block_weights)

    assert_is_product(multiply(x, packed, None), x, dense)
    grad = random_input(3, 50)
    assert_is_product(backward(grad, packed), grad, dense.T)


@pytest.mark.parametrize("bits", BITS)
def test_shards_of_a_linear(bits: int) -> None:
    packed, dense = random_linear(bits, 96, 128, 32, 0.05, torch.float16, 4)
    x = random_input(2, 128)
    rows = slice_rows(packed, 32, 96)
    columns = [slice_columns(packed, 0, 64), slice_columns(packed, 64, 128)]

    assert supports(rows, x.dtype)
    assert_is_product(multiply(x, rows, None), x, dense[32:])
    # Columns cut out of the planes are not contiguous: another kernel's work.
    assert not any(supports(part, x.dtype) for part in columns)


@pytest.mark.usefixtures("restore_threads")
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("tokens", [1, 3, MAX_FUSED_TOKENS, 20])
def test_bits_do_not_depend_on_threads_or_runs(bits: int, tokens: int) -> None:
    packed, _ = random_linear(bits, 67, 256, 64, 0.03, torch.bfloat16, 5)
    x = random_input(tokens, 256)

    assert_bits_are_fixed(multiply, x, packed)


@pytest.mark.parametrize("bits", BITS)
def test_a_token_does_not_see_its_neighbours(bits: int) -> None:
    packed, _ = random_linear(bits, 33, 128, 32, 0.03, torch.bfloat16, 6)
    x = random_input(MAX_FUSED_TOKENS, 128)

    assert_tokens_are_apart(multiply, x, packed)


def test_inputs_are_left_alone() -> None:
    packed, _ = random_linear(3, 33, 64, 32, 0.03, torch.float16, 7)
    x = random_input(3, 64)
    before = [tensor.clone() for tensor in (x, *packed.tensors().values())]

    multiply(x, packed, None)

    after = (x, *packed.tensors().values())
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_no_call_waits_for_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    packed, _ = random_linear(3, 8, 64, 16, 0.02, torch.float16, 8)
    layout = FloatLanes(chunk_reader(planes_weight(packed).kind), 8)
    needed = set()

    def make(*key: object) -> tuple[None, FloatLanes]:
        needed.add(key)
        return None, layout

    monkeypatch.setattr(cpu_exact, "_gemv", make)
    monkeypatch.setattr(cpu_exact, "_dequantize", lambda *key: needed.add(key))
    monkeypatch.setattr(cpu_exact, "_call", cpu_exact._call.__wrapped__)
    monkeypatch.setattr(OpenMP, "run", lambda *arguments: None)
    kernel.warm_up(packed, torch.float32, None)
    warm = set(needed)

    for tokens in range(1, MAX_FUSED_TOKENS + 3):
        multiply(random_input(tokens, 64), packed, None)

    assert needed == warm
    assert len(warm) == 5


def test_what_it_leaves_to_others() -> None:
    whole, _ = random_linear(3, 8, 64, 16, 0.02, torch.float16, 8)
    half, _ = random_linear(3, 8, 48, 16, 0.02, torch.float16, 8)

    assert not supports(half, torch.float32)
    assert not supports(whole, torch.float64)
