from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tacq_vllm.format.layouts import linear_specs
from tacq_vllm.format.linear import PackedLinear
from tacq_vllm.format.schema import QuantizationSchema
from tacq_vllm.format.stored import unpack_outliers
from tacq_vllm.format.values import check_linear
from tacq_vllm.kernels.reference import dequantize
from tests.builders import random_linear
from tests.cuts import slice_columns, slice_rows

BITS = st.sampled_from([2, 3, 4])
SEEDS = st.integers(0, 2**16)


@given(
    bits=BITS,
    out_features=st.integers(1, 70),
    groups=st.integers(1, 3),
    group_size=st.sampled_from([16, 32, 48]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16]),
    seed=SEEDS,
)
def test_tensors_are_those_that_the_schema_promises(
    bits: int,
    out_features: int,
    groups: int,
    group_size: int,
    dtype: torch.dtype,
    seed: int,
) -> None:
    in_features = groups * group_size
    packed, dense = random_linear(
        bits, out_features, in_features, group_size, 0.05, dtype, seed
    )
    schema = QuantizationSchema(
        bits=bits,
        group_size=group_size,
        dtype="float16" if dtype == torch.float16 else "bfloat16",
        linears={"a": (out_features, in_features)},
        circuits={"default": {"a": unpack_outliers(packed).nnz}},
    )

    tensors = packed.tensors()

    specs = linear_specs(schema, "a")
    assert tensors.keys() == specs.keys()
    for name, spec in specs.items():
        assert tensors[name].dtype == spec.dtype
        assert tensors[name].shape == spec.shape
        assert tensors[name].nbytes == spec.nbytes
    again = PackedLinear.from_tensors(tensors, bits, in_features)
    torch.testing.assert_close(dequantize(again).double(), dense, rtol=1e-6, atol=1e-6)


@given(
    bits=BITS,
    group_size=st.sampled_from([-1, 32]),
    start=st.integers(0, 3),
    length=st.integers(1, 4),
    ragged=st.integers(0, 31),
    seed=SEEDS,
)
def test_slicing_rows_is_slicing_the_dense_weight(
    bits: int, group_size: int, start: int, length: int, ragged: int, seed: int
) -> None:
    # The last cut may end inside a word: the rows of the whole linear do.
    start, stop = 32 * start, 32 * (start + length) + ragged
    total = stop if ragged else stop + 32
    packed, _ = random_linear(bits, total, 64, group_size, 0.03, torch.float16, seed)

    part = slice_rows(packed, start, stop)

    assert part.out_features == stop - start
    assert torch.equal(dequantize(part), dequantize(packed)[start:stop])
    assert check_linear(part) is None


@given(
    bits=BITS,
    group_size=st.sampled_from([-1, 16, 32, 64]),
    start=st.integers(0, 2),
    length=st.integers(1, 2),
    seed=SEEDS,
)
def test_slicing_columns_is_slicing_the_dense_weight(
    bits: int, group_size: int, start: int, length: int, seed: int
) -> None:
    start, stop = 64 * start, 64 * (start + length)
    packed, _ = random_linear(bits, 9, 256, group_size, 0.03, torch.bfloat16, seed)

    part = slice_columns(packed, start, stop)

    assert part.in_features == stop - start
    assert torch.equal(dequantize(part), dequantize(packed)[:, start:stop])
    assert check_linear(part) is None


def test_check_linear_names_the_tensor_at_fault() -> None:
    packed, _ = random_linear(2, 8, 64, 32, 0.1, torch.float16, 0)
    scales = packed.scales.clone()
    scales[3, 1] = float("inf")
    outliers = packed.outliers.clone()
    outliers[1] = -1

    assert check_linear(packed) is None
    assert str(check_linear(replace(packed, scales=scales))) == (
        "scales: a value is not finite"
    )
    assert str(check_linear(replace(packed, outliers=outliers))) == (
        "outliers: row offsets run backwards"
    )


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_scales_that_no_weight_has_are_refused(bits: int) -> None:
    packed, _ = random_linear(bits, 8, 64, 32, 0.0, torch.bfloat16, 0)
    step = 2**bits - 1

    packed.scales[3, 1] = -1.01 * 2.0**127 / step
    fault = check_linear(packed)
    packed.scales[3, 1] = -0.99 * 2.0**127 / step

    reason = f"{step} times a value is too large to be a weight"
    assert str(fault) == f"scales: {reason}"
    assert check_linear(packed) is None
