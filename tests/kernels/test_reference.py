import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tacq_vllm.kernels import reference
from tacq_vllm.kernels.reference import dequantize, linear_backward, linear_forward
from tests.builders import assert_is_product, kept_ones, random_linear

BITS = st.sampled_from([2, 3, 4])
STORAGE_DTYPES = st.sampled_from([torch.float16, torch.bfloat16])


@given(
    bits=BITS,
    out_features=st.integers(1, 70),
    in_features=st.sampled_from([16, 48, 64, 96]),
    per_row=st.booleans(),
    density=st.sampled_from([0.0, 0.01, 0.05, 1.0]),
    dtype=STORAGE_DTYPES,
    seed=st.integers(0, 2**16),
)
def test_dequantize(
    bits: int,
    out_features: int,
    in_features: int,
    per_row: bool,
    density: float,
    dtype: torch.dtype,
    seed: int,
) -> None:
    group_size = -1 if per_row else 16
    packed, dense = random_linear(
        bits, out_features, in_features, group_size, density, dtype, seed
    )

    weight = dequantize(packed)

    assert weight.dtype == torch.float32
    torch.testing.assert_close(weight.double(), dense, rtol=1e-6, atol=1e-6)
    # One rounding from float32, not one per step.
    assert torch.equal(dequantize(packed, dtype), weight.to(dtype))


@given(
    bits=BITS,
    shape=st.sampled_from([(), (1,), (7,), (0,), (2, 3), (2, 0, 3)]),
    x_dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    dtype=STORAGE_DTYPES,
    with_bias=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_linear_forward(
    bits: int,
    shape: tuple[int, ...],
    x_dtype: torch.dtype,
    dtype: torch.dtype,
    with_bias: bool,
    seed: int,
) -> None:
    packed, dense = random_linear(bits, 40, 96, 32, 0.03, dtype, seed)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, 96, generator=generator).to(x_dtype)
    bias = torch.randn(40, generator=generator).to(x_dtype) if with_bias else None

    out = linear_forward(x, packed, bias)

    assert_is_product(out, x, dense, bias)


@pytest.mark.parametrize("block_weights", [1, 64, 7 * 64, 1 << 18])
def test_blocks_of_any_size_give_the_same(
    monkeypatch: pytest.MonkeyPatch, block_weights: int
) -> None:
    packed, dense = random_linear(3, 50, 64, 16, 0.03, torch.float16, 0)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(reference, "BLOCK_WEIGHTS", block_weights)

    assert_is_product(linear_forward(x, packed, None), x, dense)
    grad = torch.randn(3, 50, generator=torch.Generator().manual_seed(1))
    assert_is_product(linear_backward(grad, packed), grad, dense.T)


def test_a_gradient_in_16_bits_is_added_up_in_32(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reference, "BLOCK_WEIGHTS", 1)
    grad = torch.ones(1, 51, dtype=torch.bfloat16)
    # To which in 16 bits one more adds nothing.
    grad[0, 0] = 256

    total = linear_backward(grad, kept_ones(51, 32))

    assert torch.equal(total, torch.full((1, 32), 306.0).bfloat16())


def test_the_kept_value_is_exact_where_the_code_is_the_zero_point() -> None:
    packed, _ = random_linear(2, 8, 32, 32, 1.0, torch.bfloat16, 0)
    planes = packed.qweight.clone().zero_(), packed.qzeros.clone().zero_()
    base = type(packed)(
        planes[0], None, packed.scales, planes[1], None, packed.outliers, 2, 32
    )
    values = (packed.outliers[9:] >> 16).to(torch.int16).view(torch.bfloat16)

    assert torch.equal(dequantize(base, torch.bfloat16).flatten(), values)
