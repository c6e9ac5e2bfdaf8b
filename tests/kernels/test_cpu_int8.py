from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.builders import (
    assert_is_product,
    kept_ones,
    random_input,
    random_linear,
)
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

from tacq_vllm.kernels import cpu_int8
from tacq_vllm.kernels import cpu_linear as kernel
from tacq_vllm.kernels.activations import ACTIVATIONS_VARIABLE
from tacq_vllm.kernels.cpu_int8 import MAX_GEMV_TOKENS, int8_linear
from tacq_vllm.kernels.cpu_linear import multiply
from tacq_vllm.kernels.cpu_planes import planes_weight
from tacq_vllm.kernels.cpu_token_tiles import TokenTiles

BITS = [2, 3, 4]
DOTS = available_dots()
BEST = DOTS[0]
# Each takes seconds to compile.
DOTS_AND_BITS = [*((BEST, bits) for bits in BITS), *((dot, 4) for dot in DOTS[1:])]


@pytest.fixture(autouse=True, scope="module")
def without_amx() -> Iterator[None]:
    """Multiply many tokens as processors do that have no AMX."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "has_amx", lambda: False)
        yield


def bytes_input(tokens: int, columns: int) -> Tensor:
    """Integers that 8 bits hold exactly: the largest of each block is 127."""
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randint(-127, 128, (tokens, columns), generator=generator)
    x[:, ::16] = 127
    return x.bfloat16()


def assert_is_close(a: Tensor, b: Tensor) -> None:
    """Equal but for the last bit of 16-bit numbers."""
    torch.testing.assert_close(a, b, rtol=2**-7, atol=1e-3)


@given(
    bits=st.sampled_from(BITS),
    out_features=st.integers(1, 70),
    columns=st.sampled_from([(32, 16), (96, 32), (128, 128), (576, 64), (768, 256)]),
    whole_row=st.booleans(),
    density=st.floats(0, 0.05),
    dtype=st.sampled_from([torch.float16, torch.bfloat16]),
    tokens=st.sampled_from([1, 2, 3, 4, 12]),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=20)
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
    assert relative_error(out, x, dense) < 1.5e-2


@pytest.mark.parametrize(
    ("dot", "bits", "tokens", "in_features", "group_size"),
    [
        (dot, bits, *shape)
        for dot, bits in DOTS_AND_BITS
        for shape in [
            (1, 576, 64),
            (4, 1536, -1),
            (9, 576, 32),
            (21, 1600, 64),
            (35, 96, 16),
        ]
    ]
    + [
        (BEST, bits, *shape)
        for bits in BITS
        for shape in [
            (3, 96, 16),
            (13, 576, 64),
            (2, 1024, 512),
            (130, 1536, -1),
            (300, 96, 32),
            (8, 4096, 128),
            (6, 1536, 768),
            (5, 96, -1),
            # Rows in several parts.
            (1, 17408, -1),
            (4, 8320, 64),
        ]
    ]
    + [
        # Groups that go across chunks of 256 columns.
        (BEST, bits, *shape)
        for bits, shape in [
            (2, (1, 96, 48)),
            (3, (4, 960, 96)),
            (4, (9, 768, 192)),
            (3, (5, 1440, 480)),
        ]
    ],
)
def test_what_8_bits_hold_is_multiplied_exactly(
    monkeypatch: pytest.MonkeyPatch,
    dot: str,
    bits: int,
    tokens: int,
    in_features: int,
    group_size: int,
) -> None:
    use_dot(monkeypatch, dot)
    packed, dense = random_linear(
        bits, 37, in_features, group_size, 0.02, torch.bfloat16, 1
    )
    x = bytes_input(tokens, in_features)

    # The product before it is rounded to the type of x.
    out = int8_linear(x.float(), planes_weight(packed))

    assert_is_product(out, x.float(), dense)


@pytest.mark.parametrize(("dot", "bits"), DOTS_AND_BITS)
@pytest.mark.parametrize("tokens", [2, 6])
def test_the_largest_codes_and_bytes_do_not_overflow(
    monkeypatch: pytest.MonkeyPatch, dot: str, bits: int, tokens: int
) -> None:
    use_dot(monkeypatch, dot)
    packed, _ = random_linear(bits, 16, 4096, -1, 0.0, torch.bfloat16, 2)
    for plane in packed.weight_planes:
        plane.fill_(-1)
    for plane in packed.zero_planes:
        plane.zero_()
    x = torch.full((tokens, 4096), 127.0)
    x[1] = -127.0

    out = int8_linear(x, planes_weight(packed))

    expected = 127.0 * 4096 * (2**bits - 1) * packed.scales[:, 0].float()
    torch.testing.assert_close(out[0], expected)
    torch.testing.assert_close(out[1], -expected)


@pytest.mark.usefixtures("restore_threads")
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("tokens", [1, 3, 20])
def test_bits_do_not_depend_on_threads_or_runs(bits: int, tokens: int) -> None:
    packed, _ = random_linear(bits, 67, 576, 64, 0.03, torch.bfloat16, 5)
    x = random_input(tokens, 576, dtype=torch.bfloat16)

    assert_bits_are_fixed(multiply, x, packed)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", [64, 32])
def test_a_token_does_not_see_its_neighbours(bits: int, group_size: int) -> None:
    packed, _ = random_linear(bits, 33, 576, group_size, 0.03, torch.bfloat16, 6)
    x = random_input(40, 576, dtype=torch.bfloat16)

    assert_tokens_are_apart(multiply, x[:MAX_GEMV_TOKENS], packed)
    many = multiply(x, packed, None)
    fewer = multiply(x[11:22], packed, None)
    assert torch.equal(many[11:22], fewer)
    # Few and many tokens are summed up in different orders.
    assert_is_close(multiply(x[11:12], packed, None), many[11:12])


@pytest.mark.parametrize("tokens", [2, 6])
def test_results_are_rounded_to_the_nearest_or_even(tokens: int) -> None:
    packed = kept_ones(20, 64)
    x = torch.zeros(tokens, 64, dtype=torch.bfloat16)
    x[:, 1] = 1
    # Both sums have nine bits, and lie between two numbers of eight.
    x[::2, 0], x[1::2, 0] = 256, 258

    out = multiply(x, packed, None)

    assert bool((out[::2] == 256).all())
    assert bool((out[1::2] == 260).all())


@pytest.mark.parametrize("dot", DOTS)
def test_no_call_waits_for_a_kernel(monkeypatch: pytest.MonkeyPatch, dot: str) -> None:
    use_dot(monkeypatch, dot)
    packed, _ = random_linear(3, 20, 64, 32, 0.02, torch.bfloat16, 7)
    kind, needed = planes_weight(packed).kind, set()
    layout = TokenTiles(torch.bfloat16, 4, 64)

    def make(*key: object) -> tuple[None, TokenTiles]:
        needed.add(key)
        return None, layout

    monkeypatch.setattr(cpu_int8, "_kernel", make)
    kernel.warm_up(packed, torch.bfloat16, None)
    warm = set(needed)

    for tokens in range(1, 20):
        cpu_int8._call.__wrapped__(kind, torch.bfloat16, dot, tokens)

    assert needed == warm
    assert len(warm) == 4


def test_zeros_and_numbers_that_are_none() -> None:
    packed, _ = random_linear(3, 20, 96, 32, 0.02, torch.bfloat16, 7)
    x = torch.zeros(4, 96, dtype=torch.bfloat16)
    x[1, 5] = torch.nan
    x[2, 40] = torch.inf

    out = multiply(x, packed, None)

    assert bool((out[[0, 3]] == 0).all())
    assert not bool(out[[1, 2]].isfinite().any())


def test_bias() -> None:
    packed, _ = random_linear(2, 20, 64, 32, 0.02, torch.bfloat16, 8)
    x = random_input(3, 64, dtype=torch.bfloat16)
    bias = random_input(20, dtype=torch.bfloat16)

    out = multiply(x, packed, bias)

    assert torch.equal(out, multiply(x, packed, None) + bias)


def test_float32_is_exact() -> None:
    packed, dense = random_linear(3, 20, 64, 32, 0.02, torch.bfloat16, 9)
    x = random_input(3, 64, dtype=torch.float32)

    assert_is_product(multiply(x, packed, None), x, dense)


def test_the_environment_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    packed, dense = random_linear(3, 40, 64, 32, 0.02, torch.bfloat16, 10)
    x = random_input(3, 64, dtype=torch.bfloat16)
    rounded = multiply(x, packed, None)
    kernel.activations.cache_clear()
    monkeypatch.setenv(ACTIVATIONS_VARIABLE, "exact")
    try:
        exact = multiply(x, packed, None)
        kernel.activations.cache_clear()
        monkeypatch.setenv(ACTIVATIONS_VARIABLE, "bf16")
        with pytest.raises(ValueError, match="TACQ_CPU_ACTIVATIONS=bf16: int8 or"):
            multiply(x, packed, None)
    finally:
        kernel.activations.cache_clear()

    assert relative_error(exact, x, dense) < relative_error(rounded, x, dense) / 1.5
