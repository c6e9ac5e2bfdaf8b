import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tacq_vllm.format.linear import PackedLinear
from tacq_vllm.kernels import triton_dense
from tacq_vllm.kernels.reference import dequantize
from tacq_vllm.kernels.triton_tuning import TUNING
from tests.builders import assert_is_product, random_input, random_linear
from tests.cuts import slice_columns, slice_rows
from tests.kernels.cases import uneven_outliers
from tests.kernels.gpu import backward, kernel, multiply, to_device

BITS = [2, 3, 4]
STORAGE_DTYPES = st.sampled_from([torch.float16, torch.bfloat16])
X_DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EVERY_WAY = [1, 2, 40, 130]
"""Tokens: one for each kernel, and a tile that is not full."""


pytestmark = pytest.mark.usefixtures("interpreter")


@given(
    bits=st.sampled_from(BITS),
    out_features=st.integers(1, 70),
    in_features=st.sampled_from([16, 48, 64, 96, 160, 256]),
    group_size=st.sampled_from([-1, 16, 32]),
    density=st.floats(0, 0.05),
    dtype=STORAGE_DTYPES,
    x_dtype=st.sampled_from(X_DTYPES),
    tokens=st.integers(1, 140),
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
    if group_size != -1 and in_features % group_size:
        group_size = 16
    packed, dense = random_linear(
        bits, out_features, in_features, group_size, density, dtype, seed
    )
    x = random_input(tokens, in_features, dtype=x_dtype)
    bias = random_input(out_features, dtype=x_dtype) if with_bias else None

    assert_is_product(multiply(x, packed, bias), x, dense, bias)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("tokens", EVERY_WAY)
@pytest.mark.parametrize("x_dtype", X_DTYPES)
def test_every_way(bits: int, tokens: int, x_dtype: torch.dtype) -> None:
    packed, dense = random_linear(bits, 96, 192, 64, 0.01, torch.bfloat16, 0)
    x, bias = random_input(tokens, 192, dtype=x_dtype), random_input(96, dtype=x_dtype)

    assert_is_product(multiply(x, packed, bias), x, dense, bias)


@pytest.mark.parametrize("bits", BITS)
@uneven_outliers
def test_uneven_outliers(bits: int, density: float, rows: slice) -> None:
    packed, dense = random_linear(
        bits, 37, 64, 32, density, torch.bfloat16, 1, outlier_rows=rows
    )

    for tokens in EVERY_WAY:
        x = random_input(tokens, 64)
        assert_is_product(multiply(x, packed), x, dense)


@pytest.mark.parametrize("tokens", EVERY_WAY)
def test_more_columns_than_a_tile(tokens: int) -> None:
    packed, dense = random_linear(3, 20, 4224, 64, 0.004, torch.bfloat16, 2)
    x = random_input(tokens, 4224)

    assert_is_product(multiply(x, packed), x, dense)


@pytest.mark.parametrize("tokens", EVERY_WAY)
def test_x_that_is_not_contiguous(tokens: int) -> None:
    packed, dense = random_linear(2, 24, 64, 16, 0.02, torch.float16, 3)
    x = random_input(64, 2, tokens).permute(2, 1, 0)[:, 1]

    assert_is_product(multiply(x, packed), x, dense)
    batch = x.reshape(1, tokens, 64)
    assert multiply(batch, packed).shape == (1, tokens, 24)


@pytest.mark.parametrize("bits", BITS)
def test_cuts(bits: int) -> None:
    packed, dense = random_linear(bits, 96, 128, 32, 0.05, torch.bfloat16, 4)

    for tokens in EVERY_WAY:
        x = random_input(tokens, 128)
        columns = slice_columns(packed, 32, 96)
        assert_is_product(multiply(x, slice_rows(packed, 32, 96)), x, dense[32:96])
        x = x[:, 32:96]
        contiguous = {n: t.contiguous() for n, t in columns.tensors().items()}
        columns = PackedLinear.from_tensors(contiguous, bits, 64)
        assert_is_product(multiply(x, columns), x, dense[:, 32:96])


@pytest.mark.parametrize("splits", [2, 5, 100])
def test_splits_add_up(monkeypatch: pytest.MonkeyPatch, splits: int) -> None:
    tuning = replace(TUNING, programs=splits)
    monkeypatch.setattr(kernel, "tuning_for", lambda major: tuning)
    packed, dense = random_linear(3, 40, 672, 32, 0.05, torch.bfloat16, 5)
    x, bias = random_input(9, 672), random_input(40)

    out = multiply(x, packed, bias)

    assert_is_product(out, x, dense, bias)
    assert torch.equal(out, multiply(x, packed, bias))


def test_a_weight_larger_than_the_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    packed, dense = random_linear(3, 70, 64, 16, 0.05, torch.bfloat16, 6)
    x, bias = random_input(200, 64), random_input(70)
    whole = multiply(x, packed, bias)

    monkeypatch.setattr(triton_dense, "_WORKSPACE_WEIGHTS", 64 * 12)

    out = multiply(x, packed, bias)
    assert_is_product(out, x, dense, bias)
    torch.testing.assert_close(out, whole)
    for x_dtype in X_DTYPES:
        grad = random_input(5, 70, dtype=x_dtype)
        assert_is_product(backward(grad, packed), grad, dense.T)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", [(70,), (5, 70), (2, 3, 70)])
def test_gradients(bits: int, shape: tuple[int, ...]) -> None:
    packed, dense = random_linear(bits, 70, 64, 16, 0.05, torch.bfloat16, 6)

    for x_dtype in X_DTYPES:
        grad = random_input(*shape, dtype=x_dtype)
        assert_is_product(backward(grad, packed), grad, dense.T)


@pytest.mark.parametrize("bits", BITS)
def test_a_kept_weight_is_exact(bits: int) -> None:
    """Where the code is the zero-point it adds nothing, whatever the scale."""
    packed, _ = random_linear(bits, 32, 64, 32, 1.0, torch.bfloat16, 7)
    patterns = {
        name: torch.full_like(tensor, 0x55555555)
        for name, tensor in packed.tensors().items()
        if name.startswith(("qweight", "qzeros"))
    }
    packed = PackedLinear.from_tensors({**packed.tensors(), **patterns}, bits, 64)
    kept = dequantize(packed)

    for tokens in EVERY_WAY:
        x = torch.eye(64)[torch.arange(tokens) % 64]
        assert torch.equal(multiply(x, packed), kept[:, torch.arange(tokens) % 64].T)


def test_warm_up() -> None:
    packed, _ = random_linear(2, 32, 64, 32, 0.01, torch.bfloat16, 8)

    kernel.warm_up(to_device(packed), torch.bfloat16, None)


def test_what_is_not_served() -> None:
    packed, _ = random_linear(2, 32, 64, 32, 0.01, torch.bfloat16, 9)

    assert not kernel.supports(packed, torch.float64)
    assert not kernel.supports(slice_columns(packed, 0, 32), torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("arguments", ["89 3 --largest", "90 2,3,4", "100 3 --largest"])
def test_compiles_without_a_gpu(arguments: str, tmp_path: Path) -> None:
    script = Path(__file__).parent / "compile_triton.py"
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)

    result = subprocess.run(
        [sys.executable, script, *arguments.split()],
        env=environment,
        capture_output=True,
        text=True,
    )

    assert result.returncode == 0, result.stderr
