"""The CPU kernels on weights of clusters."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tacq_vllm.format.clustered import ClusteredLinear, pack_clustered
from tacq_vllm.format.clusters import WIDE, Clusters
from tacq_vllm.format.outliers import select_outliers
from tests.builders import assert_is_product, random_input
from tests.clusters import random_clustered
from tests.kernels.cases import uneven_outliers
from tests.kernels.cpu import (
    OBSTACLE,
    assert_bits_are_fixed,
    assert_tokens_are_apart,
    available_dots,
    relative_error,
    use_dot,
)

if OBSTACLE is not None:
    pytest.skip(OBSTACLE, allow_module_level=True)

from tacq_vllm.kernels import cpu_linear as kernel
from tacq_vllm.kernels.cpu_amx import has_amx
from tacq_vllm.kernels.cpu_clusters import clusters_weight
from tacq_vllm.kernels.cpu_exact import MAX_FUSED_TOKENS
from tacq_vllm.kernels.cpu_int8 import MAX_GEMV_TOKENS, int8_linear
from tacq_vllm.kernels.cpu_linear import backward, multiply

DOTS = available_dots()
BEST = DOTS[0]
STORAGE_DTYPES = st.sampled_from([torch.float16, torch.bfloat16])
WAYS = ["exact", "int8", *["amx"] * has_amx()]
COLUMNS = [
    *[(96, 96), (192, 96), (576, 192), (576, 96), (768, 384), (1536, 768)],
    # A chunk of 192 columns has parts of two groups.
    *[(288, 288), (1440, 480)],
]
"""Columns, and of a group."""


@contextmanager
def activations(way: str) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "activations", lambda: "int8" if way == "amx" else way)
        patch.setattr(kernel, "has_amx", lambda: way == "amx")
        yield


@given(
    out_features=st.integers(1, 70),
    columns=st.sampled_from(COLUMNS),
    whole_row=st.integers(1, 700) | st.none(),
    density=st.floats(0, 0.05),
    dtype=STORAGE_DTYPES,
    x_dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    tokens=st.integers(1, 20),
    with_bias=st.booleans(),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=60)
def test_any_shape_is_exact(
    out_features: int,
    columns: tuple[int, int],
    whole_row: int | None,
    density: float,
    dtype: torch.dtype,
    x_dtype: torch.dtype,
    tokens: int,
    with_bias: bool,
    seed: int,
) -> None:
    in_features, group_size = columns if whole_row is None else (whole_row, -1)
    linear, dense = random_clustered(
        out_features, in_features, group_size, density, dtype, seed
    )
    x = random_input(tokens, in_features, dtype=x_dtype)
    bias = random_input(out_features, dtype=x_dtype) if with_bias else None
    assert kernel.supports(linear, x.dtype)

    with activations("exact"):
        out = multiply(x, linear, bias)

    assert_is_product(out, x, dense, bias)
    grad = random_input(tokens, out_features, dtype=x_dtype)
    assert_is_product(backward(grad, linear), grad, dense.T)


@pytest.mark.parametrize("way", WAYS[1:])
@given(
    out_features=st.integers(1, 70),
    columns=st.sampled_from(COLUMNS),
    whole_row=st.integers(1, 1600) | st.none(),
    density=st.floats(0, 0.05),
    dtype=STORAGE_DTYPES,
    tokens=st.sampled_from([1, 2, 3, 4, 12]),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=30)
def test_any_shape_in_8_bits(
    way: str,
    out_features: int,
    columns: tuple[int, int],
    whole_row: int | None,
    density: float,
    dtype: torch.dtype,
    tokens: int,
    seed: int,
) -> None:
    in_features, group_size = columns if whole_row is None else (whole_row, -1)
    linear, dense = random_clustered(
        out_features, in_features, group_size, density, dtype, seed
    )
    x = random_input(tokens, in_features, dtype=dtype)

    with activations(way):
        out = multiply(x, linear, None)

    assert out.dtype == dtype
    assert relative_error(out, x, dense) < 1.5e-2


@pytest.mark.parametrize(
    ("dot", "tokens", "columns"),
    [
        *((dot, 1, (576, -1)) for dot in DOTS),
        *((dot, 4, (1536, 96)) for dot in DOTS),
        *((dot, 9, (1000, -1)) for dot in DOTS),
        (BEST, 3, (100, -1)),
        (BEST, 6, (576, 192)),
        (BEST, 130, (1536, 768)),
        (BEST, 8, (4096, -1)),
        (BEST, 4, (4096, -1)),
        (BEST, 2, (1440, 480)),
        (BEST, 5, (13, -1)),
    ],
)
def test_what_8_bits_hold_is_multiplied_exactly(
    monkeypatch: pytest.MonkeyPatch, dot: str, tokens: int, columns: tuple[int, int]
) -> None:
    use_dot(monkeypatch, dot)
    linear, dense = random_clustered(37, *columns, 0.02, torch.bfloat16, 1)
    weight = clusters_weight(linear)
    generator = torch.Generator().manual_seed(tokens)
    x = torch.zeros(tokens, weight.kind.columns)
    x[:, : columns[0]] = torch.randint(
        -127, 128, (tokens, columns[0]), generator=generator
    )
    x[:, ::48] = 127

    # The product before it is rounded to the type of x.
    out = int8_linear(x, weight)

    assert_is_product(out, x[:, : columns[0]], dense)


@pytest.mark.parametrize("dot", DOTS)
@pytest.mark.parametrize("tokens", [2, 6])
def test_the_largest_codes_and_bytes_do_not_overflow(
    monkeypatch: pytest.MonkeyPatch, dot: str, tokens: int
) -> None:
    use_dot(monkeypatch, dot)
    codes = torch.tensor([0, WIDE[0], WIDE[0]], dtype=torch.int8).repeat(16, 4032 // 3)
    indices = torch.ones(16, 4032 // 6, dtype=torch.uint8)
    none = torch.zeros(16, 4032)
    scales = random_input(16, 1, dtype=torch.bfloat16)
    linear = pack_clustered(
        Clusters(codes, indices), scales, select_outliers(none.bfloat16(), none.bool())
    )
    x = torch.full((tokens, 4032), -127.0)
    x[1] = 127.0

    out = int8_linear(x, clusters_weight(linear))

    expected = 4 * 127.0 * (4032 // 3 * 2) * scales[:, 0].float()
    torch.testing.assert_close(out[0], expected)
    torch.testing.assert_close(out[1], -expected)


@pytest.mark.parametrize("way", WAYS)
@uneven_outliers
def test_uneven_outliers(way: str, density: float, rows: slice) -> None:
    linear, dense = random_clustered(
        37, 130, -1, density, torch.bfloat16, 1, outlier_rows=rows
    )
    for tokens in (3, MAX_FUSED_TOKENS + 1):
        x = random_input(tokens, 130, dtype=torch.bfloat16)
        with activations(way):
            assert relative_error(multiply(x, linear, None), x, dense) < 1.5e-2


@pytest.mark.parametrize(
    "view",
    [
        lambda: random_input(100, 5).T,
        lambda: random_input(5, 200)[:, ::2],
        lambda: random_input(5, 200)[:, 3:103],
        lambda: random_input(1, 100).expand(5, -1),
        lambda: random_input(3, 5, 100).transpose(0, 1),
        lambda: random_input(100),
    ],
    ids=["transposed", "strided", "offset", "expanded", "swapped", "vector"],
)
def test_inputs_of_any_form(view) -> None:
    linear, dense = random_clustered(21, 100, -1, 0.02, torch.float16, 3)
    x = view()

    assert_is_product(multiply(x, linear, None), x, dense)


@pytest.mark.usefixtures("restore_threads")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("tokens", [1, 3, MAX_FUSED_TOKENS, 20])
def test_bits_do_not_depend_on_threads_or_runs(way: str, tokens: int) -> None:
    linear, _ = random_clustered(67, 576, 96, 0.03, torch.bfloat16, 5)
    x = random_input(tokens, 576, dtype=torch.bfloat16)

    with activations(way):
        assert_bits_are_fixed(multiply, x, linear)


@pytest.mark.parametrize("way", WAYS)
def test_a_token_does_not_see_its_neighbours(way: str) -> None:
    linear, _ = random_clustered(33, 500, -1, 0.03, torch.bfloat16, 6)
    x = random_input(MAX_GEMV_TOKENS, 500, dtype=torch.bfloat16)

    with activations(way):
        assert_tokens_are_apart(multiply, x, linear)


@pytest.mark.parametrize("way", WAYS)
def test_what_pads_a_row_is_not_read_as_weights(way: str) -> None:
    linear, _ = random_clustered(20, 100, -1, 0.02, torch.bfloat16, 7)
    padded = ClusteredLinear(
        linear.qweight.clone(), linear.scales, linear.outliers, 100
    )
    # The second block has 4 weights, of one pair: the first 12 bits of its words.
    padded.qweight[:, 7] |= ~0xFFF
    padded.qweight[:, 8:13] = -1
    for tokens in (2, 12):
        x = random_input(tokens, 100, dtype=torch.bfloat16)
        with activations(way):
            expected = multiply(x, linear, None)
            assert torch.equal(multiply(x, padded, None), expected)


def test_the_name_of_the_kernel() -> None:
    linear, _ = random_clustered(4, 192, 96, 0.0, torch.bfloat16, 8)

    assert kernel.kernel_name(linear, torch.float32) == "cpu exact"
    assert kernel.kernel_name(linear, torch.bfloat16).startswith("cpu int8 ")
    assert not kernel.supports(linear, torch.float64)


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
def test_warm_up(x_dtype: torch.dtype) -> None:
    linear, _ = random_clustered(4, 100, -1, 0.0, torch.bfloat16, 9)

    kernel.warm_up(linear, x_dtype, None)
