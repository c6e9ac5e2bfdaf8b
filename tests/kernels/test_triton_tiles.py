"""The order that weights have on a GPU, and the kernels for it."""

from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from tacq_vllm.format.clustered import ClusteredLinear
from tacq_vllm.format.linear import PackedLinear
from tacq_vllm.format.outliers import decode_outliers
from tacq_vllm.kernels import tiling, triton_dense
from tacq_vllm.kernels.ops import arrange
from tacq_vllm.kernels.tiles import ROWS, TiledLinear
from tacq_vllm.kernels.tiling import can_tile, tile
from tacq_vllm.kernels.triton_tuning import TUNING
from tests.builders import assert_is_product, random_input, random_linear
from tests.clusters import random_clustered
from tests.interpreter import DEVICE
from tests.kernels.cases import some_outliers
from tests.kernels.gpu import backward, kernel, to_device

BITS = [2, 3, 4]
DTYPES = [torch.float16, torch.bfloat16]
EVERY_WAY = [1, 9, 17, 65, 257]
"""Tokens: few, a batch in each of its tiles, and more than those take."""

pytestmark = pytest.mark.usefixtures("interpreter")


def multiply(
    x: Tensor, packed: PackedLinear | ClusteredLinear, bias: Tensor | None = None
) -> Tensor:
    """Multiply with the tiled weight; the product comes back."""
    tiled = tile(to_device(packed))
    bias = None if bias is None else bias.to(DEVICE)
    out: Tensor = kernel.multiply(x.to(DEVICE), tiled, bias)
    assert not tiled.counters.any()
    return out.cpu()


@given(
    bits=st.sampled_from(BITS),
    out_features=st.integers(1, 70),
    in_features=st.sampled_from([448, 480, 512, 896, 1024, 1280]),
    group_size=st.sampled_from([-1, 32, 64, 128, 256]),
    density=st.floats(0, 0.05),
    dtype=st.sampled_from(DTYPES),
    x_dtype=st.sampled_from(DTYPES),
    tokens=st.integers(1, 20) | st.integers(17, 260),
    with_bias=st.booleans(),
    seed=st.integers(0, 2**16),
)
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
    assume(group_size == -1 or in_features % group_size == 0)
    packed, dense = random_linear(
        bits, out_features, in_features, group_size, density, dtype, seed
    )
    assume(can_tile(packed))
    x = random_input(tokens, in_features, dtype=x_dtype)
    bias = random_input(out_features, dtype=x_dtype) if with_bias else None

    assert_is_product(multiply(x, packed, bias), x, dense, bias)


@pytest.mark.parametrize("bits", BITS)
@some_outliers
def test_uneven_outliers(bits: int, density: float, rows: slice) -> None:
    packed, dense = random_linear(
        bits, 37, 512, 64, density, torch.bfloat16, 1, outlier_rows=rows
    )

    for tokens in (1, 17, 100):
        x = random_input(tokens, 512, dtype=torch.bfloat16)
        assert_is_product(multiply(x, packed), x, dense)


def test_all_weights_are_kept() -> None:
    packed, dense = random_linear(3, 20, 256, 64, 1.0, torch.bfloat16, 1)
    x = random_input(17, 256, dtype=torch.bfloat16)

    assert_is_product(multiply(x, packed), x, dense)


@pytest.mark.parametrize("bits", BITS)
def test_groups_larger_than_a_block(bits: int) -> None:
    packed, dense = random_linear(bits, 20, 2048, 1024, 0.01, torch.float16, 2)

    for tokens in EVERY_WAY:
        x = random_input(tokens, 2048, dtype=torch.float16)
        assert_is_product(multiply(x, packed), x, dense)


@pytest.mark.parametrize("bits", BITS)
def test_small_scales_keep_their_bits(bits: int) -> None:
    """Those of float16, which are subnormal a few places further."""
    packed, dense = random_linear(bits, 20, 1024, 64, 0, torch.float16, 4)
    packed = replace(packed, scales=packed.scales * 2**-7)

    for tokens in EVERY_WAY:
        x = random_input(tokens, 1024, dtype=torch.float16)
        expected = x.double() @ dense.T
        error = multiply(x * 2**7, packed).double() - expected
        assert error.norm() < 5e-4 * expected.norm()


def test_as_many_tiles_of_tokens_as_there_are() -> None:
    packed, dense = random_linear(3, 20, 1024, 64, 0.01, torch.bfloat16, 11)
    x = random_input(256, 1024, dtype=torch.bfloat16)

    assert_is_product(multiply(x, packed), x, dense)


@pytest.mark.parametrize("programs", [1, 1000])
@pytest.mark.parametrize(("tokens", "rows"), [(5, 36), (130, 68)])
def test_splits_add_up(
    monkeypatch: pytest.MonkeyPatch, programs: int, tokens: int, rows: int
) -> None:
    tuning = replace(
        TUNING,
        tiled_gemm=tuple(replace(t, warps=programs) for t in TUNING.tiled_gemm),
        tiled_batch=tuple(replace(t, programs=programs) for t in TUNING.tiled_batch),
    )
    monkeypatch.setattr(kernel, "tuning_for", lambda major: tuning)
    packed, dense = random_linear(3, rows, 1536, 64, 0.02, torch.bfloat16, 3)
    x = random_input(tokens, 1536, dtype=torch.bfloat16)
    bias = random_input(rows, dtype=torch.bfloat16)

    out = multiply(x, packed, bias)

    assert_is_product(out, x, dense, bias)
    assert torch.equal(out, multiply(x, packed, bias))


def test_a_weight_larger_than_the_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    packed, dense = random_linear(3, 150, 512, 64, 0.05, torch.bfloat16, 4)
    x = random_input(200, 512, dtype=torch.bfloat16)

    monkeypatch.setattr(triton_dense, "_WORKSPACE_WEIGHTS", 512 * 64)

    assert_is_product(multiply(x, packed), x, dense)
    grad = random_input(5, 150, dtype=torch.bfloat16)
    assert_is_product(backward(grad, tile(packed)), grad, dense.T)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("x_dtype", DTYPES)
def test_gradients(bits: int, x_dtype: torch.dtype) -> None:
    packed, dense = random_linear(bits, 70, 768, 64, 0.02, torch.bfloat16, 4)
    grad = random_input(2, 3, 70, dtype=x_dtype)

    assert_is_product(backward(grad, tile(packed)), grad, dense.T)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", [-1, 32, 64, 256])
def test_a_dequantized_weight_is_exact(bits: int, group_size: int) -> None:
    packed, dense = random_linear(bits, 20, 512, group_size, 0, torch.float16, 9)

    columns = multiply(torch.eye(512, dtype=torch.float16), packed)

    assert torch.equal(columns.T, dense.half())


@pytest.mark.parametrize("in_features", [512, 960])
def test_clusters_become_codes_of_three_bits(in_features: int) -> None:
    clustered, dense = random_clustered(40, in_features, -1, 0.02, torch.bfloat16, 10)

    for tokens in EVERY_WAY:
        x = random_input(tokens, in_features, dtype=torch.bfloat16)
        assert_is_product(multiply(x, clustered), x, dense)


@pytest.mark.parametrize("in_features", [512, 960])
def test_rows_are_dealt_out_a_part_at_a_time(
    monkeypatch: pytest.MonkeyPatch, in_features: int
) -> None:
    packed, _ = random_linear(3, 40, in_features, 64, 0.02, torch.bfloat16, 10)
    clustered, _ = random_clustered(40, in_features, -1, 0.02, torch.bfloat16, 10)
    for linear in (packed, clustered):
        whole = tile(linear).tensors()
        with monkeypatch.context() as patch:
            patch.setattr(tiling, "_ROWS_AT_A_TIME", 16)
            parts = tile(linear).tensors()

        assert parts.keys() == whole.keys()
        assert all(torch.equal(parts[name], whole[name]) for name in whole)


def test_kept_weights_lie_together_by_columns() -> None:
    packed, _ = random_linear(2, 40, 6144, 64, 0.02, torch.bfloat16, 5)
    tiled = tile(packed)
    counts = tiled.segment_starts.diff()
    blocks = torch.arange(len(counts)).repeat_interleave(counts)
    words = tiled.segments
    columns = tiled.segment_columns[:, None] + (words & 0xFFF)
    rows = blocks[:, None] * ROWS + (words >> 12 & 0xF)
    values = (words >> 16).to(torch.int16).view(torch.bfloat16)

    kept = torch.zeros(3 * ROWS, 6144, dtype=torch.bfloat16)
    kept.index_put_((rows, columns), values, accumulate=True)

    expected = decode_outliers(packed.outliers, 40, torch.bfloat16)
    assert torch.equal(kept[:40][expected.rows, expected.columns], expected.values)
    assert kept.count_nonzero() == expected.values.count_nonzero()
    is_entry = values != 0
    for own in columns.split(counts.tolist()):
        filled = own.flatten()[is_entry[: len(own)].flatten()]
        assert filled.diff().min() >= 0
        is_entry = is_entry[len(own) :]


def test_other_programs_share_a_row_with_very_many_kept_weights() -> None:
    packed, dense = random_linear(3, 20, 6144, 64, 0.6, torch.float16, 5, slice(5, 6))
    jobs = tile(packed).job_blocks

    assert len(jobs) > 3
    assert not jobs.any()
    for tokens in (1, 12, 40):
        x = random_input(tokens, 6144, dtype=torch.float16)
        assert_is_product(multiply(x, packed), x, dense)


@pytest.mark.parametrize(
    ("in_features", "group_size", "bits", "expected"),
    [
        (512, 64, 3, True),
        (512, -1, 2, True),
        (896, 64, 3, True),
        (480, -1, 2, True),
        (256, 64, 4, True),
        (256, 64, 2, False),
        (576, 64, 2, False),
        (384, 64, 2, False),
        (500, -1, 2, False),
        (496, -1, 2, False),
        (512, 16, 2, False),
        (960, 96, 2, False),
    ],
)
def test_what_can_be_tiled(
    in_features: int, group_size: int, bits: int, expected: bool
) -> None:
    packed, _ = random_linear(
        bits, 32, in_features, group_size, 0.01, torch.bfloat16, 6
    )

    assert can_tile(packed) == expected


def test_a_tiled_weight_is_about_as_large() -> None:
    packed, _ = random_linear(3, 256, 4096, 64, 0.0035, torch.bfloat16, 7)

    sizes = [
        sum(tensor.nbytes for tensor in linear.tensors().values())
        for linear in (packed, tile(packed))
    ]

    assert sizes[1] < 1.15 * sizes[0]


def test_what_is_arranged() -> None:
    packed, _ = random_linear(3, 32, 512, 64, 0.01, torch.bfloat16, 8)

    assert isinstance(kernel.arrange(packed, torch.bfloat16), TiledLinear)
    assert kernel.arrange(packed, torch.float32) is packed
    assert not kernel.supports(tile(packed), torch.float32)
    kernel.warm_up(tile(to_device(packed)), torch.bfloat16, None)
    if DEVICE.type == "cpu":
        assert arrange(packed, torch.bfloat16) is packed
