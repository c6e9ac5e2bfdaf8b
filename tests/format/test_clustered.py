import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tacq_vllm.format.layouts import layout_of, linear_specs
from tacq_vllm.format.schema import QuantizationSchema
from tacq_vllm.format.stored import unpack_outliers
from tacq_vllm.format.values import check_linear, check_range
from tacq_vllm.kernels.reference import dequantize, linear_backward, linear_forward
from tests.builders import assert_is_product, random_input
from tests.clusters import random_clustered

SEEDS = st.integers(0, 2**16)


@given(
    out_features=st.integers(1, 20),
    columns=st.integers(1, 200),
    dtype=st.sampled_from([torch.float16, torch.bfloat16]),
    seed=SEEDS,
)
def test_tensors_are_those_that_the_schema_promises(
    out_features: int, columns: int, dtype: torch.dtype, seed: int
) -> None:
    stored, dense = random_clustered(out_features, columns, -1, 0.05, dtype, seed)
    schema = QuantizationSchema(
        format_version=2,
        layout="clusters",
        bits=2,
        group_size=-1,
        dtype="float16" if dtype == torch.float16 else "bfloat16",
        linears={"a": (out_features, columns)},
        circuits={"default": {"a": unpack_outliers(stored).nnz}},
    )

    tensors = stored.tensors()

    specs = linear_specs(schema, "a")
    assert tensors.keys() == specs.keys()
    for name, spec in specs.items():
        assert tensors[name].dtype == spec.dtype
        assert tensors[name].shape == spec.shape
    again = layout_of(schema).linear(tensors, columns)
    assert again.group_size == columns
    assert check_linear(again) is None
    assert torch.equal(dequantize(again).double(), dense)


@pytest.mark.parametrize("group_size", [-1, 96, 192])
def test_every_group_has_its_scale(group_size: int) -> None:
    stored, dense = random_clustered(5, 384, group_size, 0.02, torch.bfloat16, 1)

    assert stored.group_size == (384 if group_size == -1 else group_size)
    assert torch.equal(dequantize(stored).double(), dense)


@pytest.mark.parametrize("shape", [(576,), (3, 576), (2, 40, 576), (0, 576)])
def test_products_and_gradients(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Several blocks of rows, the last one short.
    monkeypatch.setattr("tacq_vllm.kernels.reference.BLOCK_WEIGHTS", 7 * 576)
    stored, dense = random_clustered(24, 576, 192, 0.03, torch.bfloat16, 2)
    x, bias = random_input(*shape), random_input(24)

    assert_is_product(linear_forward(x, stored, bias), x, dense, bias)

    grad = random_input(*shape[:-1], 24)
    assert_is_product(linear_backward(grad, stored), grad, dense.T)


def test_scales_that_no_weight_has_are_refused() -> None:
    stored, _ = random_clustered(4, 96, -1, 0.0, torch.bfloat16, 3)

    stored.scales[2, 0] = -(2.0**125)
    fault = check_linear(stored)
    assert str(fault) == "scales: 4 times a value is too large to be a weight"

    stored.scales[2, 0] = -(2.0**14)
    assert check_linear(stored) is None
    assert check_range(stored, torch.bfloat16) is None
    assert "does not fit torch.float16" in str(check_range(stored, torch.float16))
