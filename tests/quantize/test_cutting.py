"""What is cut out of texts, and what is left of them whole."""

import pytest
import torch

from tacq_vllm.quantize.calibration import cut_windows, take_whole
from tacq_vllm.quantize.samples import Sample


def texts(*lengths: int) -> list[Sample]:
    """Texts whose tokens count up, over all of them."""
    tokens = torch.arange(sum(lengths))
    return [Sample.of(part) for part in tokens.split(list(lengths))]


def test_windows_are_cut_out_of_a_text() -> None:
    chosen = cut_windows(texts(300), 8, 6, 0)

    assert not chosen.ran_out
    assert len(chosen.samples) == 6
    starts = [int(sample.tokens[0]) for sample in chosen.samples]
    for start, sample in zip(starts, chosen.samples, strict=True):
        assert sample.tokens.tolist() == list(range(start, start + 8))
        assert bool(sample.scored.all())
    assert len(set(starts)) == 6
    assert starts != sorted(starts)


def test_windows_run_over_the_ends_of_texts() -> None:
    chosen = cut_windows(texts(*[5] * 20), 8, 4, 0)

    for sample in chosen.samples:
        assert torch.equal(sample.tokens.diff(), torch.ones(7, dtype=torch.int64))


def test_windows_are_seeded() -> None:
    first, again, other = (
        torch.stack(
            [sample.tokens for sample in cut_windows(texts(300), 8, 4, s).samples]
        )
        for s in (1, 1, 2)
    )

    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    ("length", "sizes"), [(31, [8, 8, 8, 7]), (17, [8, 8]), (3, [3]), (1, []), (0, [])]
)
def test_a_text_that_is_too_short_is_used_once(length: int, sizes: list[int]) -> None:
    chosen = cut_windows(texts(length), 8, 4, 0)

    assert chosen.ran_out
    assert [sample.tokens.numel() for sample in chosen.samples] == sizes
    tokens = [token for s in chosen.samples for token in s.tokens.tolist()]
    assert tokens == list(range(sum(sizes)))


def test_a_text_of_one_window_gives_it() -> None:
    (sample,) = cut_windows(texts(8), 8, 1, 0).samples

    assert sample.tokens.tolist() == list(range(8))


@pytest.mark.parametrize("seed", range(20))
def test_windows_are_whole_where_the_text_is_short(seed: int) -> None:
    chosen = cut_windows(texts(9), 4, 2, seed)

    assert [sample.tokens.numel() for sample in chosen.samples] == [4, 4]


def test_no_more_texts_are_read_than_windows_need() -> None:
    remaining = iter(texts(*[10] * 1000))

    cut_windows(remaining, 8, 4, 0)

    assert len(list(remaining)) > 900


def test_samples_stay_whole_up_to_the_budget() -> None:
    samples = texts(5, 9, 2, 7)

    chosen = take_whole(samples, 16, None)

    assert not chosen.ran_out
    assert chosen.too_long == 0
    assert all(a is b for a, b in zip(chosen.samples, samples[:3], strict=True))


@pytest.mark.parametrize(("budget", "count"), [(1, 1), (14, 2), (15, 2), (23, 4)])
def test_one_sample_is_taken_in_any_case(budget: int, count: int) -> None:
    assert len(take_whole(texts(5, 9, 2, 7), budget, None).samples) == count


def test_too_few_samples_are_all_used_once() -> None:
    chosen = take_whole(texts(5, 9), 100, None)

    assert chosen.ran_out
    assert sum(sample.tokens.numel() for sample in chosen.samples) == 14


def test_samples_that_are_just_enough_do_not_run_out() -> None:
    assert not take_whole(texts(5, 9), 14, None).ran_out


def test_samples_longer_than_the_model_takes_are_left_out() -> None:
    chosen = take_whole(texts(5, 9, 2, 8, 11), 100, 8)

    assert [sample.tokens.numel() for sample in chosen.samples] == [5, 2, 8]
    assert chosen.too_long == 2


def test_a_sample_of_one_token_teaches_nothing() -> None:
    assert [s.tokens.numel() for s in take_whole(texts(1, 5, 0), 9, None).samples] == [
        5
    ]
