from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tacq_vllm.format.clusters import CLUSTER, unpack_clusters
from tacq_vllm.kernels import triton_dense
from tests.builders import assert_is_product, random_input
from tests.clusters import random_clustered
from tests.interpreter import DEVICE
from tests.kernels.cases import uneven_outliers
from tests.kernels.gpu import backward, kernel, multiply, to_device

cluster_codes = pytest.importorskip(
    "tacq_vllm.kernels.triton_cluster_codes", reason="needs Triton"
)

X_DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EVERY_WAY = [1, 3, 8, 12]
"""Tokens: for each kernel, and a tile that is not full."""


pytestmark = pytest.mark.usefixtures("interpreter")


@given(
    out_features=st.integers(1, 70),
    columns=st.sampled_from([(96, 96), (288, 96), (576, 288)]),
    whole_row=st.integers(1, 400) | st.none(),
    density=st.floats(0, 0.05),
    dtype=st.sampled_from([torch.float16, torch.bfloat16]),
    x_dtype=st.sampled_from(X_DTYPES),
    tokens=st.integers(1, 20),
    with_bias=st.booleans(),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=40)
def test_any_shape(
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

    assert_is_product(multiply(x, linear, bias), x, dense, bias)


@uneven_outliers
def test_uneven_outliers(density: float, rows: slice) -> None:
    linear, dense = random_clustered(
        37, 64, -1, density, torch.bfloat16, 1, outlier_rows=rows
    )

    for tokens in EVERY_WAY:
        x = random_input(tokens, 64)
        assert_is_product(multiply(x, linear), x, dense)


@pytest.mark.parametrize("tokens", EVERY_WAY)
def test_more_columns_than_a_tile(tokens: int) -> None:
    linear, dense = random_clustered(20, 4096, -1, 0.004, torch.bfloat16, 2)
    x = random_input(tokens, 4096)

    assert_is_product(multiply(x, linear), x, dense)


@pytest.mark.parametrize("tokens", EVERY_WAY)
def test_x_that_is_not_contiguous(tokens: int) -> None:
    linear, dense = random_clustered(24, 64, -1, 0.02, torch.float16, 3)
    x = random_input(64, 2, tokens).permute(2, 1, 0)[:, 1]

    assert_is_product(multiply(x, linear), x, dense)
    batch = x.reshape(1, tokens, 64)
    assert multiply(batch, linear).shape == (1, tokens, 24)


def test_a_weight_larger_than_the_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    linear, dense = random_clustered(70, 96, -1, 0.05, torch.bfloat16, 6)
    x, bias = random_input(20, 96), random_input(70)
    whole = multiply(x, linear, bias)

    monkeypatch.setattr(triton_dense, "_WORKSPACE_WEIGHTS", 96 * 12)

    out = multiply(x, linear, bias)
    assert_is_product(out, x, dense, bias)
    torch.testing.assert_close(out, whole)
    grad = random_input(5, 70, dtype=torch.bfloat16)
    assert_is_product(backward(grad, linear), grad, dense.T)


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
def test_gradients(x_dtype: torch.dtype) -> None:
    linear, dense = random_clustered(70, 192, 96, 0.05, torch.bfloat16, 7)
    grad = random_input(2, 3, 70, dtype=x_dtype)

    assert_is_product(backward(grad, linear), grad, dense.T)


def test_the_table_has_every_cluster() -> None:
    """An entry is what the format says of a cluster with its number's bits."""
    words = torch.zeros(1, 7, dtype=torch.int32)
    for number, entry in enumerate(cluster_codes.code_table(DEVICE).tolist()):
        words[0, 0], words[0, 6] = number % 64, number // 64
        codes = unpack_clusters(words, CLUSTER).codes[0].tolist()
        assert [(entry >> 8 * place) - 4 & 7 for place in range(3)] == [
            code & 7 for code in codes
        ]
        assert entry < 1 << 24


def test_warm_up() -> None:
    linear, _ = random_clustered(32, 64, -1, 0.01, torch.bfloat16, 8)

    kernel.warm_up(to_device(linear), torch.bfloat16, None)


def test_what_is_not_served() -> None:
    linear, _ = random_clustered(32, 192, -1, 0.01, torch.bfloat16, 9)
    part = replace(linear, qweight=linear.qweight[:, :7], in_features=96)

    assert not kernel.supports(linear, torch.float64)
    assert not kernel.supports(part, torch.float32)
