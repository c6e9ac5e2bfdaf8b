import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tacq_vllm.config import GptqConfig
from tacq_vllm.quantize.grid import Grid, fit_grid

CONFIG = GptqConfig(grid_steps=40)
NO_SHRINK = GptqConfig(grid_steps=1)
BITS = st.sampled_from([2, 3, 4])
DTYPES = st.sampled_from([torch.float16, torch.bfloat16])
SEEDS = st.integers(0, 2**16)


def random_weight(out_features: int, columns: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(out_features, columns, generator=generator)
    # Rows of any sign and place: the grids of some have their zero at an end.
    return W + torch.randn(out_features, 1, generator=generator) * 2


def as_columns(grid: Grid) -> Grid:
    return Grid(grid.scales.unsqueeze(1), grid.zeros.unsqueeze(1), grid.max_code)


def rounding_errors(grid: Grid, W: Tensor, norm: float) -> Tensor:
    """Error of each row: float32 [out]."""
    grid = as_columns(grid)
    return (grid.values(grid.codes(W)) - W).abs().pow(norm).sum(1)


@given(bits=BITS, dtype=DTYPES, columns=st.integers(1, 40), seed=SEEDS)
def test_a_grid_can_be_stored(
    bits: int, dtype: torch.dtype, columns: int, seed: int
) -> None:
    W = random_weight(6, columns, seed)

    grid = fit_grid(W, None, bits, dtype, CONFIG)

    assert grid.max_code == 2**bits - 1
    assert torch.equal(grid.scales.to(dtype).float(), grid.scales)
    assert bool((grid.scales > 0).all())
    assert torch.equal(grid.zeros.round().clamp(0, grid.max_code), grid.zeros)
    codes = as_columns(grid).codes(W)
    assert torch.equal(codes.round().clamp(0, grid.max_code), codes)
    # Zero is on every grid, which is what a kept weight's code stands for.
    assert not bool(grid.values(grid.zeros).any())


@given(bits=BITS, dtype=DTYPES, columns=st.integers(1, 40), seed=SEEDS)
def test_codes_are_the_nearest_values(
    bits: int, dtype: torch.dtype, columns: int, seed: int
) -> None:
    W = random_weight(6, columns, seed)
    grid = as_columns(fit_grid(W, None, bits, dtype, CONFIG))

    chosen = grid.values(grid.codes(W))

    every = grid.values(torch.arange(2**bits).view(-1, 1, 1))
    nearest = (every - W).abs().amin(0)
    torch.testing.assert_close((chosen - W).abs(), nearest, rtol=1e-5, atol=1e-6)


@given(bits=BITS, dtype=DTYPES, columns=st.integers(1, 40), seed=SEEDS)
def test_searching_is_never_worse_than_the_whole_range(
    bits: int, dtype: torch.dtype, columns: int, seed: int
) -> None:
    W = random_weight(6, columns, seed)

    searched = fit_grid(W, None, bits, dtype, CONFIG)
    whole = fit_grid(W, None, bits, dtype, NO_SHRINK)

    norm = CONFIG.grid_norm
    errors = rounding_errors(searched, W, norm)
    assert bool((errors <= rounding_errors(whole, W, norm)).all())


def test_searching_gives_up_the_tails_for_the_middle() -> None:
    W = torch.randn(4, 256, generator=torch.Generator().manual_seed(0))

    searched = rounding_errors(fit_grid(W, None, 2, torch.float16, CONFIG), W, 2.4)
    whole = rounding_errors(fit_grid(W, None, 2, torch.float16, NO_SHRINK), W, 2.4)

    assert bool((searched < 0.6 * whole).all())


def search_plainly(row: Tensor, bits: int, config: GptqConfig) -> tuple[float, float]:
    """The scale and the zero-point that the search of one row should find."""
    max_code = 2**bits - 1
    low, high = min(0.0, float(row.min())), max(0.0, float(row.max()))

    def grid(step: int) -> tuple[float, float]:
        shrink = 1 - config.grid_max_shrink * step / config.grid_steps
        scale = float(torch.tensor(shrink * (high - low) / max_code).bfloat16())
        return scale, min(max(round(-shrink * low / scale), 0), max_code)

    def error(step: int) -> float:
        scale, zero = grid(step)
        codes = (row.double() / scale).round().add(zero).clamp(0, max_code)
        return float(((codes - zero) * scale - row).abs().pow(config.grid_norm).sum())

    best = min(range(0, config.grid_steps, 4), key=error)
    around = range(max(0, best - 3), min(config.grid_steps, best + 4))
    return grid(min(around, key=error))


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize(("steps", "norm"), [(1, 2.4), (6, 0.5), (40, 2.4)])
def test_every_fourth_range_is_tried_and_those_around_the_best(
    bits: int, steps: int, norm: float
) -> None:
    config = GptqConfig(grid_steps=steps, grid_norm=norm)
    W = random_weight(60, 24, bits)
    # Rows of one sign, and some of which the best range is the narrowest.
    W[:10], W[10:20] = W[:10].abs() + 3.0, -W[10:20].abs() - 3.0
    W[20:30] *= 0.05
    W[20:30, 5] = 1.0

    grid = fit_grid(W, None, bits, torch.bfloat16, config)

    expected = torch.tensor([search_plainly(row, bits, config) for row in W])
    assert torch.equal(grid.scales, expected[:, 0])
    assert torch.equal(grid.zeros, expected[:, 1])


@given(bits=BITS, seed=SEEDS)
def test_kept_weights_have_no_say(bits: int, seed: int) -> None:
    W = random_weight(6, 32, seed)
    kept = torch.rand(6, 32, generator=torch.Generator().manual_seed(seed)) < 0.2
    grid = fit_grid(W, kept, bits, torch.bfloat16, CONFIG)

    other = fit_grid(torch.where(kept, 1000.0, W), kept, bits, torch.bfloat16, CONFIG)

    assert torch.equal(other.scales, grid.scales)
    assert torch.equal(other.zeros, grid.zeros)


def test_a_kept_weight_counts_as_the_mean_of_the_others() -> None:
    W = torch.tensor([[9.0, 1.0, 2.0, 6.0], [-1.0, 3.0, 40.0, 50.0]])
    kept = W > 8

    grid = fit_grid(W, kept, 2, torch.bfloat16, CONFIG)

    means = torch.tensor([[3.0, 1.0, 2.0, 6.0], [-1.0, 3.0, 1.0, 1.0]])
    other = fit_grid(means, None, 2, torch.bfloat16, CONFIG)
    assert torch.equal(other.scales, grid.scales)
    assert torch.equal(other.zeros, grid.zeros)


def test_keeping_the_largest_weight_narrows_the_grid() -> None:
    W = random_weight(3, 32, 1)
    W[1, 7] = 50.0
    kept = torch.zeros(3, 32, dtype=torch.bool)
    kept[1, 7] = True

    with_it = fit_grid(W, None, 3, torch.float16, CONFIG).scales
    without = fit_grid(W, kept, 3, torch.float16, CONFIG).scales

    assert without[1] < 0.5 * with_it[1]
    assert torch.equal(without[[0, 2]], with_it[[0, 2]])


@pytest.mark.parametrize("value", [0.0, 1e-12], ids=["zero", "too small to scale"])
def test_a_row_without_a_scale_is_zero(value: float) -> None:
    W = random_weight(3, 16, 2)
    W[1], W[1, 0] = value, -value

    grid = as_columns(fit_grid(W, None, 3, torch.float16, CONFIG))

    assert bool(grid.scales.isfinite().all())
    assert float(grid.scales[1]) == 1.0
    assert not bool(grid.values(grid.codes(W))[1].any())


def test_a_row_that_is_kept_whole_has_a_finite_grid() -> None:
    W = random_weight(2, 16, 3)
    kept = torch.zeros(2, 16, dtype=torch.bool)
    kept[0] = True

    grid = fit_grid(W, kept, 3, torch.float16, CONFIG)

    assert bool(grid.scales.isfinite().all())
    assert float(grid.zeros[0]) == 0.0


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_values_of_one_sign_use_every_code(sign: float) -> None:
    W = sign * torch.linspace(0.0, 7.0, 8).unsqueeze(0)

    grid = as_columns(fit_grid(W, None, 3, torch.float16, NO_SHRINK))

    assert torch.equal(grid.values(grid.codes(W)), W)
    assert sorted(grid.codes(W)[0].tolist()) == list(range(8))


def test_chunks_of_rows_do_not_matter() -> None:
    # More weights than are searched at a time.
    W = random_weight(1100, 64, 4)

    together = fit_grid(W, None, 2, torch.bfloat16, CONFIG)

    parts = [fit_grid(rows, None, 2, torch.bfloat16, CONFIG) for rows in W.split(100)]
    assert torch.equal(together.scales, torch.cat([part.scales for part in parts]))
    assert torch.equal(together.zeros, torch.cat([part.zeros for part in parts]))
