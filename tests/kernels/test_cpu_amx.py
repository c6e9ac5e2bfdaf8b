"""The CPU kernel that multiplies by AMX, where the processor has that."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tacq_vllm.format.linear import PackedLinear, pack_linear
from tacq_vllm.format.outliers import select_outliers
from tests.builders import kept_ones, random_input, random_linear, random_mask
from tests.kernels.cases import uneven_outliers
from tests.kernels.cpu import OBSTACLE, assert_bits_are_fixed, relative_error

if OBSTACLE is not None:
    pytest.skip(OBSTACLE, allow_module_level=True)

from tacq_vllm.kernels import cpu_amx
from tacq_vllm.kernels import cpu_linear as kernel
from tacq_vllm.kernels.cpu_amx import amx_linear, has_amx
from tacq_vllm.kernels.cpu_amx_tokens import AmxTokens
from tacq_vllm.kernels.cpu_int8 import MAX_GEMV_TOKENS
from tacq_vllm.kernels.cpu_linear import multiply
from tacq_vllm.kernels.cpu_planes import planes_weight

if not has_amx():
    pytest.skip("the processor has no AMX for bfloat16", allow_module_level=True)

BITS = [2, 3, 4]
FEW = MAX_GEMV_TOKENS + 1
"""Tokens from which on the kernel is used."""


def whole_numbers(
    bits: int, out_features: int, in_features: int, group_size: int, dtype: torch.dtype
) -> tuple[PackedLinear, Tensor]:
    """Weights that bfloat16 holds exactly: eighths, below 32; as float64, too."""
    generator = torch.Generator().manual_seed(out_features)
    shape = out_features, in_features
    size = in_features if group_size == -1 else group_size
    codes = torch.randint(2**bits, shape, generator=generator)
    zeros = torch.randint(2**bits, (shape[0], shape[1] // size), generator=generator)
    scales = torch.full(zeros.shape, 1 / 8, dtype=dtype)
    values = (torch.randint(-127, 128, shape, generator=generator) / 8).to(dtype)
    mask = random_mask(shape, 0.05, generator, slice(None))

    dense = (codes - zeros.repeat_interleave(size, dim=1)) / 8
    dense[mask] += values[mask].float()
    packed = pack_linear(codes, zeros, scales, select_outliers(values, mask), bits)
    return packed, dense.double()


@given(
    bits=st.sampled_from(BITS),
    out_features=st.integers(1, 150),
    columns=st.sampled_from([(96, 32), (64, 64), (576, 64), (896, 64), (1536, 64)]),
    whole_row=st.booleans(),
    density=st.floats(0, 0.05),
    dtype=st.sampled_from([torch.float16, torch.bfloat16]),
    tokens=st.integers(FEW, 300),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=30)
def test_any_shape(
    bits: int,
    out_features: int,
    columns: tuple[int, int],
    whole_row: bool,
    density: float,
    dtype: torch.dtype,
    tokens: int,
    seed: int,
) -> None:
    in_features, group_size = columns
    group_size = -1 if whole_row else group_size
    packed, dense = random_linear(
        bits, out_features, in_features, group_size, density, dtype, seed
    )
    x = random_input(tokens, in_features, dtype=dtype)

    out = multiply(x, packed, None)

    assert out.dtype == dtype
    assert relative_error(out, x, dense) < 4e-3


# Each kind of weight takes seconds to compile.
@pytest.mark.parametrize(
    ("bits", "dtype", "tokens", "out_features", "in_features", "group_size"),
    [
        (bits, dtype, *shape)
        for bits, dtype in [
            *((bits, torch.bfloat16) for bits in BITS),
            (4, torch.float16),
        ]
        for shape in [
            # The last 256 columns are all there, or up to a quarter, a half, or more.
            (16, 32, 512, 64),
            (5, 17, 576, 64),
            (33, 40, 896, 64),
            (48, 33, 192, 64),
            (7, 100, 96, -1),
            # Tokens are shared by threads, fewer than a slab has and more; or rows are,
            # more than a part has.
            (140, 33, 192, 64),
            (300, 70, 320, 64),
            (530, 2200, 64, 64),
            (40, 1100, 64, 64),
            (20, 1100, 64, 64),
        ]
    ]
    + [
        # A group is a lane, two, a chunk of columns, or more.
        (bits, torch.bfloat16, *shape)
        for bits, shape in [
            (2, (17, 20, 160, 16)),
            (3, (21, 16, 32, 32)),
            (4, (18, 20, 288, 32)),
            (2, (18, 20, 768, 256)),
            (3, (18, 20, 1024, 512)),
            # It goes across chunks, and across quarters of one, or not.
            (4, (9, 20, 96, 48)),
            (2, (9, 20, 576, 96)),
            (3, (9, 20, 768, 192)),
        ]
    ],
)
def test_what_bfloat16_holds_is_multiplied_exactly(
    bits: int,
    dtype: torch.dtype,
    tokens: int,
    out_features: int,
    in_features: int,
    group_size: int,
) -> None:
    packed, dense = whole_numbers(bits, out_features, in_features, group_size, dtype)
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randint(-8, 9, (tokens, in_features), generator=generator)

    out = multiply(x.to(dtype), packed, None)

    # Sums of so small numbers are exact, in whatever order; so is one rounding.
    assert torch.equal(out, (x.double() @ dense.T).to(dtype))


@uneven_outliers
def test_uneven_outliers(density: float, rows: slice) -> None:
    packed, dense = random_linear(
        3, 37, 320, 64, density, torch.bfloat16, 1, outlier_rows=rows
    )
    x = random_input(20, 320, dtype=torch.bfloat16)

    assert relative_error(multiply(x, packed, None), x, dense) < 4e-3


@pytest.mark.usefixtures("restore_threads")
@pytest.mark.parametrize("tokens", [FEW, 40, 140, 300])
def test_bits_do_not_depend_on_threads_or_runs(tokens: int) -> None:
    packed, _ = random_linear(3, 167, 576, 64, 0.03, torch.bfloat16, 5)
    x = random_input(tokens, 576, dtype=torch.bfloat16)

    assert_bits_are_fixed(multiply, x, packed)


def test_a_token_does_not_see_its_neighbours() -> None:
    packed, _ = random_linear(3, 33, 576, 64, 0.03, torch.bfloat16, 6)
    x = random_input(400, 576, dtype=torch.bfloat16)

    many = multiply(x, packed, None)

    for part in (slice(11, 22), slice(250, 290)):
        assert torch.equal(many[part], multiply(x[part], packed, None))


def test_results_are_rounded_to_the_nearest_or_even() -> None:
    packed = kept_ones(20, 64)
    x = torch.zeros(6, 64, dtype=torch.bfloat16)
    x[:, 1] = 1
    # Both sums have nine bits, and lie between two numbers of eight.
    x[::2, 0], x[1::2, 0] = 256, 258

    out = multiply(x, packed, None)

    assert bool((out[::2] == 256).all())
    assert bool((out[1::2] == 260).all())


def test_zeros_and_numbers_that_are_none() -> None:
    packed, _ = random_linear(3, 20, 96, 32, 0.02, torch.bfloat16, 7)
    x = torch.zeros(FEW, 96, dtype=torch.bfloat16)
    x[1, 5] = torch.nan
    x[2, 40] = torch.inf

    out = multiply(x, packed, None)

    assert bool((out[[0, 3, 4]] == 0).all())
    assert not bool(out[[1, 2]].isfinite().any())


def test_no_call_waits_for_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    packed, _ = random_linear(3, 20, 64, 32, 0.02, torch.bfloat16, 7)
    kind, needed = planes_weight(packed).kind, set()

    def make(*key: object) -> tuple[None, AmxTokens]:
        needed.add(key)
        return None, AmxTokens(torch.bfloat16, 4)

    monkeypatch.setattr(cpu_amx, "_kernel", make)
    kernel.warm_up(packed, torch.bfloat16, None)
    warm = set(needed)
    for tokens in (FEW, 16, 300):
        cpu_amx._call.__wrapped__(kind, torch.bfloat16, tokens)

    assert needed == warm
    assert len(warm) == 1


def test_the_kernel_is_used_where_there_are_more_than_few_tokens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    packed, _ = random_linear(3, 20, 64, 32, 0.02, torch.bfloat16, 8)
    x = random_input(FEW, 64, dtype=torch.bfloat16)
    calls = []

    def count(x: Tensor, weight: object) -> Tensor:
        calls.append(x.shape[0])
        return amx_linear(x, planes_weight(packed))

    monkeypatch.setattr(kernel, "amx_linear", count)
    for tokens in range(1, FEW + 1):
        multiply(x[:tokens], packed, None)
    multiply(x.float(), packed, None)

    assert calls == [FEW]
    assert kernel.kernel_name(packed, torch.bfloat16).endswith(", bf16 amx")
    assert kernel.kernel_name(packed, torch.float32) == "cpu exact"
