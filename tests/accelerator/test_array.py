import numpy as np
import pytest

from tacq_vllm.accelerator.array import count_tile, make_streams, run_tile
from tacq_vllm.accelerator.design import DESIGNS, MAC_3, MAC_8, TEMPORAL
from tests.clusters import random_clusters

SEEDS = range(100)


def random_tile(seed: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    rows, columns = generator.integers(1, 6, 2)
    length = int(generator.integers(1, 40))
    codes = random_clusters(int(rows), length, seed).codes.numpy()
    activations = generator.integers(-128, 128, (length, columns))
    return codes, activations.astype(np.int8)


@pytest.mark.parametrize("design", DESIGNS, ids=lambda design: design.name)
def test_outputs_are_the_integer_product(design):
    for seed in SEEDS:
        codes, activations = random_tile(seed)

        run = run_tile(codes, activations, design)

        expected = codes.astype(np.int64) @ activations.astype(np.int64)
        assert np.array_equal(run.outputs, expected)
        assert count_tile(codes, activations.shape[1], design) == run.counts


def test_a_pulse_train_is_as_long_as_the_magnitude():
    codes = np.array([[3, 0, -1], [-4, 0, 1]])
    activations = np.array([[5], [6], [7]])

    streams = make_streams(codes, activations, TEMPORAL)

    assert streams.weights.tolist() == [[1, 1, 1, 0, -1], [-1, -1, -1, -1, 1]]
    assert streams.activations.tolist() == [[5, 5, 5, 5, 7]]
    assert streams.is_new.tolist() == [True, False, False, False, True]


def test_what_the_temporal_array_saves_and_costs():
    generator = np.random.default_rng(0)
    codes = generator.integers(-4, 4, (8, 48))
    temporal = count_tile(codes, 8, TEMPORAL)
    mac = count_tile(codes, 8, MAC_3)

    assert temporal.multiplications == 0
    assert temporal.additions == np.abs(codes).sum() * 8
    assert mac.multiplications == mac.additions == 48 * 64
    # Every column of eight such codes has a magnitude of 3 or 4 almost surely.
    assert 3 * 48 < temporal.cycles - 23 <= 4 * 48
    assert mac.cycles == 48 + 23


def test_toggles_of_one_element_by_hand():
    run = run_tile(np.array([[1]]), np.array([[3]]), MAC_8)

    # The activation goes from 0 to 3 and stays, as nothing new comes: 2 bits change.
    # Its flag and the weight, 1, go up and down again; so does the sum, 3.
    assert run.toggles == 2 + 2 * (1 + 1 + 2)
    # Registers load, the element adds, the sum leaves.
    assert run.counts.cycles == 3
    assert run.outputs.tolist() == [[3]]


def test_the_longest_row_fits_the_accumulators():
    for design, weight in ((TEMPORAL, -4), (MAC_3, -4), (MAC_8, -128)):
        largest = 14336 * 128 * -weight
        assert largest < 2 ** (design.accumulator_bits - 1)
