from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tacq_vllm.format.outliers import (
    Outliers,
    check_outliers,
    decode_outliers,
    encode_outliers,
    merge_outliers,
    select_outliers,
    slice_outlier_columns,
    slice_outlier_rows,
)

STORAGE_DTYPES = st.sampled_from([torch.float16, torch.bfloat16])


def random_outliers(
    out_features: int, in_features: int, density: float, dtype: torch.dtype, seed: int
) -> tuple[Outliers, Tensor]:
    """A table and the dense matrix [out, in] that it stands for."""
    generator = torch.Generator().manual_seed(seed)
    shape = (out_features, in_features)
    values = torch.randn(shape, generator=generator).to(dtype)
    mask = torch.rand(shape, generator=generator) < density
    return select_outliers(values, mask), values * mask


def to_dense(outliers: Outliers, in_features: int) -> Tensor:
    rows = outliers.row_offsets.numel() - 1
    dense = torch.zeros(rows, in_features, dtype=outliers.values.dtype)
    for row in range(rows):
        for entry in range(outliers.row_offsets[row], outliers.row_offsets[row + 1]):
            dense[row, outliers.columns[entry]] = outliers.values[entry]
    return dense


@given(
    out_features=st.integers(1, 12),
    in_features=st.integers(1, 40),
    density=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    dtype=STORAGE_DTYPES,
    seed=st.integers(0, 2**16),
)
def test_decode_inverts_encode(
    out_features: int, in_features: int, density: float, dtype: torch.dtype, seed: int
) -> None:
    outliers, dense = random_outliers(out_features, in_features, density, dtype, seed)

    table = encode_outliers(outliers)

    assert table.dtype == torch.int32
    assert check_outliers(table, out_features, in_features, dtype) is None
    decoded = decode_outliers(table, out_features, dtype)
    assert torch.equal(decoded.row_offsets, outliers.row_offsets)
    assert torch.equal(decoded.columns, outliers.columns)
    assert torch.equal(decoded.values, outliers.values)
    assert torch.equal(to_dense(decoded, in_features), dense)


def test_table_layout() -> None:
    values = torch.zeros(2, 65536, dtype=torch.bfloat16)
    values[0, 3] = 1.0
    values[1, 65535] = -2.0

    table = encode_outliers(select_outliers(values, values != 0))

    # bfloat16: 1.0 is 0x3F80 and -2.0 is 0xC000.
    words = [word & 0xFFFFFFFF for word in table.tolist()]
    assert words == [0, 1, 2, 0x3F80_0003, 0xC000_FFFF]
    assert check_outliers(table, 2, 65536, torch.bfloat16) is None


@given(start=st.integers(0, 10), length=st.integers(0, 10), seed=st.integers(0, 2**16))
def test_slices_are_those_of_the_dense_matrix(
    start: int, length: int, seed: int
) -> None:
    outliers, dense = random_outliers(20, 20, 0.2, torch.float16, seed)
    stop = start + length

    rows = slice_outlier_rows(outliers, start, stop)
    columns = slice_outlier_columns(outliers, start, stop)

    assert torch.equal(to_dense(rows, 20), dense[start:stop])
    assert torch.equal(to_dense(columns, length), dense[:, start:stop])


def test_merge_stacks_rows() -> None:
    parts = [random_outliers(n, 30, 0.1, torch.bfloat16, n) for n in (4, 1, 7)]

    merged = merge_outliers([outliers for outliers, _ in parts])

    assert torch.equal(to_dense(merged, 30), torch.cat([dense for _, dense in parts]))
    assert check_outliers(encode_outliers(merged), 12, 30, torch.bfloat16) is None


GOOD = Outliers(
    row_offsets=torch.tensor([0, 2, 2, 3], dtype=torch.int32),
    columns=torch.tensor([1, 5, 0], dtype=torch.int32),
    values=torch.tensor([1.0, -2.0, 0.5], dtype=torch.float16),
)


def with_offsets(*offsets: int) -> Tensor:
    changed = torch.tensor(offsets, dtype=torch.int32)
    return encode_outliers(replace(GOOD, row_offsets=changed))


def with_columns(*columns: int) -> Tensor:
    changed = torch.tensor(columns, dtype=torch.int32)
    return encode_outliers(replace(GOOD, columns=changed))


def with_value(value: float) -> Tensor:
    changed = GOOD.values.clone()
    changed[1] = value
    return encode_outliers(replace(GOOD, values=changed))


def test_a_good_table_is_accepted() -> None:
    assert check_outliers(encode_outliers(GOOD), 3, 6, torch.float16) is None


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        (with_offsets(0, 2, 1, 3), "backwards"),
        (with_offsets(0, -1, 2, 3), "backwards"),
        (with_offsets(1, 2, 2, 3), "not from 0 to 3"),
        (with_offsets(0, 2, 2, 4), "not from 0 to 3"),
        (with_offsets(0, 2, 2, 2), "not from 0 to 3"),
        (with_columns(1, 6, 0), "column 6 is outside 6"),
        (with_columns(5, 1, 0), "ascending"),
        (with_columns(5, 5, 0), "ascending"),
        (with_value(float("nan")), "not finite"),
        (with_value(float("-inf")), "not finite"),
        (encode_outliers(GOOD).to(torch.int64), "not a flat int32 table"),
        (encode_outliers(GOOD).view(1, -1), "not a flat int32 table"),
        (encode_outliers(GOOD)[:3], "fewer than 4 row offsets"),
    ],
)
def test_each_fault_is_named(table: Tensor, reason: str) -> None:
    fault = check_outliers(table, 3, 6, torch.float16)

    assert fault is not None
    assert reason in fault


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_value_that_is_no_weight_is_refused(sign: float) -> None:
    limit = 2.0**127
    faults = {
        limit * (1 - 2**-8): None,
        limit: "a kept value is too large to be a weight",
    }
    for value, fault in faults.items():
        values = torch.tensor([1.0, sign * value, 0.5]).bfloat16()
        table = encode_outliers(replace(GOOD, values=values))
        assert check_outliers(table, 3, 6, torch.bfloat16) == fault


def test_differences_of_offsets_do_not_wrap_around() -> None:
    # In int32 each of these steps is positive.
    offsets = torch.tensor([0, 2**31 - 1, -(2**31), -1, 0], dtype=torch.int32)

    fault = check_outliers(offsets, 4, 6, torch.float16)

    assert fault == "row offsets run backwards"
