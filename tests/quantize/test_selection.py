import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tacq_vllm.quantize.selection import select_top

Scores = dict[str, Tensor]


def masks(scores: Scores, count: int) -> Scores:
    selection = select_top(scores, scores.__getitem__, count)
    return {name: selection.mask(name, tensor) for name, tensor in scores.items()}


def flat(tensors: Scores) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors.values()])


floats = st.floats(min_value=0, allow_nan=False, allow_infinity=False, width=32)
# Few different values, so that ties are common.
scores = st.one_of(floats, st.sampled_from([0.0, -0.0, 1e-45, 0.5, 1.0]))


@st.composite
def problems(draw: st.DrawFn) -> tuple[Scores, int]:
    tensors = {}
    for index in range(draw(st.integers(1, 3))):
        rows, columns = draw(st.integers(1, 4)), draw(st.integers(1, 5))
        values = draw(
            st.lists(scores, min_size=rows * columns, max_size=rows * columns)
        )
        tensors[f"linear{index}"] = torch.tensor(values).view(rows, columns)
    return tensors, draw(st.integers(0, flat(tensors).numel()))


@given(problems())
def test_exactly_the_highest_are_selected(problem: tuple[Scores, int]) -> None:
    tensors, count = problem

    selected = masks(tensors, count)

    assert int(flat(selected).sum()) == count
    values = flat(tensors)[flat(selected)]
    assert torch.equal(
        values.sort(descending=True).values, flat(tensors).topk(count).values
    )


@given(problems())
def test_of_equal_scores_the_first_are_taken(problem: tuple[Scores, int]) -> None:
    tensors, count = problem
    order = sorted(range(flat(tensors).numel()), key=lambda i: -flat(tensors)[i])

    chosen = flat(masks(tensors, count)).nonzero().flatten().tolist()

    assert chosen == sorted(order[:count])


def test_ties_across_linears() -> None:
    tensors = {name: torch.ones(2, 3) for name in ("a", "b", "c")}

    selected = masks(tensors, 8)

    assert selected["a"].all()
    assert selected["b"].tolist() == [[True, True, False], [False, False, False]]
    assert not selected["c"].any()


@pytest.mark.parametrize("count", [0, -1])
def test_none(count: int) -> None:
    assert not flat(masks({"a": torch.tensor([[3.0, float("inf")]])}, count)).any()


def test_all() -> None:
    assert flat(masks({"a": torch.zeros(2, 2), "b": torch.ones(1, 3)}, 7)).all()


def test_negative_zero_is_zero() -> None:
    tensors = {"a": torch.tensor([-0.0, 0.0, 1.0, -0.0])}

    assert masks(tensors, 2)["a"].tolist() == [True, False, True, False]


def test_neighbouring_floats_are_told_apart() -> None:
    base = torch.tensor(1.5)
    above = torch.nextafter(base, torch.tensor(2.0))
    tensors = {"a": torch.stack([base, base, above, base])}

    assert masks(tensors, 1)["a"].tolist() == [False, False, True, False]


def test_scores_that_are_not_contiguous() -> None:
    tensors = {"a": torch.arange(12.0).view(3, 4).T}

    assert torch.equal(masks(tensors, 5)["a"], tensors["a"] >= 7)


def test_a_large_problem_equals_topk() -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"linear{index}": torch.randn(100, 50, generator=generator).abs().pow(8)
        for index in range(4)
    }

    selected = masks(tensors, 70)

    threshold = flat(tensors).topk(70).values[-1]
    assert torch.equal(flat(selected), flat(tensors) >= threshold)


def test_only_one_linear_is_held_at_a_time() -> None:
    asked = []

    def scores_of(name: str) -> Tensor:
        asked.append(name)
        return torch.ones(3)

    select_top(["a", "b"], scores_of, 4)

    assert asked == ["a", "b"] * 3
