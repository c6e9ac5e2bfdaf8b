"""Whether two queries gave the same rows (Zhong et al. 2020, arXiv 2010.02840)."""

from collections import Counter
from collections.abc import Hashable, Iterator, Sequence

Row = tuple[Hashable, ...]


def same_results(gold: Sequence[Row], answer: Sequence[Row], *, ordered: bool) -> bool:
    """Compare rows, whatever the order of the columns.

    Args:
        gold: rows of the right query.
        answer: rows of the other.
        ordered: whether the order of the rows counts too.
    """
    if not gold or not answer:
        return not gold and not answer
    if len(gold) != len(answer) or len(gold[0]) != len(answer[0]):
        return False
    wanted = _view(gold, ordered)
    return any(
        _view([tuple(row[c] for c in order) for row in answer], ordered) == wanted
        for order in _column_orders(gold, answer, ordered)
    )


def _view(rows: Sequence[Row], ordered: bool) -> object:
    return list(rows) if ordered else Counter(rows)


def _column_orders(
    gold: Sequence[Row], answer: Sequence[Row], ordered: bool
) -> Iterator[tuple[int, ...]]:
    """Orders of the answer's columns under which each has its gold column's values."""
    gold_views = [_view(column, ordered) for column in zip(*gold, strict=True)]
    views = [_view(column, ordered) for column in zip(*answer, strict=True)]

    def extend(chosen: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
        if len(chosen) == len(gold_views):
            yield chosen
            return
        for column, view in enumerate(views):
            if column not in chosen and view == gold_views[len(chosen)]:
                yield from extend((*chosen, column))

    return extend(())
