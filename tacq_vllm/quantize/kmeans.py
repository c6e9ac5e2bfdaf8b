"""Weighted k-means of many rows of numbers at once.

In one dimension clusters are intervals: once a row is sorted and summed up, a step of
Lloyd's algorithm looks up k bounds in it, however long it is.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

_CHUNK_VALUES = 1 << 22
"""Values that are clustered together, so that their sums fit into memory."""

_STEPS_BETWEEN_SPLITS = 5


def weighted_kmeans(
    values: Tensor, weights: Tensor, clusters: int, iterations: int
) -> Tensor:
    """Centers that minimize each row's weighted squared distance, as far as Lloyd goes.

    Of several starts (evenly spaced, quantiles, quantiles by weight, repeated
    splitting) a row takes the one that ends best, so the result is the same whenever
    and wherever it is computed.

    Args:
        values: float32 [rows, n].
        weights: float32 [rows, n], zero or more; a row of zeros counts evenly.
        clusters: centers per row.
        iterations: steps from each start.

    Returns:
        float32 [rows, clusters], in order.
    """
    rows = max(1, _CHUNK_VALUES // values.shape[1])
    parts = zip(values.split(rows), weights.split(rows), strict=True)
    return torch.cat([_cluster(v, w, clusters, iterations) for v, w in parts])


def nearest_centers(values: Tensor, centers: Tensor) -> Tensor:
    """The center next to each value: [rows, n], of centers [rows, k] in order."""
    middles = ((centers[:, 1:] + centers[:, :-1]) / 2).contiguous()
    return centers.gather(1, torch.searchsorted(middles, values.contiguous()))


@dataclass(frozen=True)
class _Rows:
    """Sorted rows with running sums, all float64."""

    values: Tensor
    """[rows, n], in order."""
    sums: Tensor
    """[3, rows, n + 1]: of all values before an index the weight, weight times value,
    and weight times its square."""

    def edges(self, centers: Tensor) -> Tensor:
        """First index of each center's interval, and the end: int64 [rows, k + 1]."""
        middles = ((centers[:, 1:] + centers[:, :-1]) / 2).contiguous()
        inner = torch.searchsorted(self.values, middles)
        return pad(pad(inner, (1, 0)), (0, 1), value=self.values.shape[1])

    def between(self, edges: Tensor) -> Tensor:
        """The sums over intervals: [3, rows, k]."""
        return self.sums.gather(2, edges.expand(3, -1, -1)).diff()

    def improve(self, centers: Tensor, steps: int) -> Tensor:
        """Move centers [rows, k] by Lloyd's steps; one without weights stays."""
        for _ in range(steps):
            mass, moment, _ = self.between(self.edges(centers))
            moved = torch.where(mass > 0, moment / mass, centers)
            if torch.equal(moved, centers):
                break
            centers = moved
        return centers

    def loss(self, centers: Tensor) -> Tensor:
        """Weighted squared distance of each row to its centers: [rows]."""
        mass, moment, square = self.between(self.edges(centers))
        distance: Tensor = square - 2 * centers * moment + centers**2 * mass
        return distance.sum(1)


def _cluster(values: Tensor, weights: Tensor, clusters: int, iterations: int) -> Tensor:
    weights = weights.double()
    weights = torch.where(weights.sum(1, keepdim=True) > 0, weights, 1.0)
    ordered, order = values.double().sort(dim=1)
    weights = weights.gather(1, order)
    powers = torch.stack([weights, weights * ordered, weights * ordered**2])
    rows = _Rows(ordered, pad(powers.cumsum(2), (1, 0)))
    best = torch.zeros(len(values), clusters, dtype=torch.float64, device=values.device)
    best_loss = torch.full_like(best[:, 0], torch.inf)
    for start in (*_spread_starts(rows, clusters), _split_start(rows, clusters)):
        centers = rows.improve(start, iterations)
        loss = rows.loss(centers)
        better = loss < best_loss
        best = torch.where(better.unsqueeze(1), centers, best)
        best_loss = torch.where(better, loss, best_loss)
    return best.float()


def _spread_starts(rows: _Rows, clusters: int) -> tuple[Tensor, Tensor, Tensor]:
    """Evenly spaced centers, quantiles, and quantiles by weight."""
    values = rows.values
    shares = (torch.arange(clusters, device=values.device) + 0.5) / clusters
    low, high = values[:, :1], values[:, -1:]
    even = low + (high - low) * shares
    n = values.shape[1]
    quantiles = values[:, (shares * n).long()]
    mass = rows.sums[0].contiguous()
    at = torch.searchsorted(mass, (mass[:, -1:] * shares).contiguous())
    return even, quantiles, values.gather(1, (at - 1).clamp(0, n - 1))


def _split_start(rows: _Rows, clusters: int) -> Tensor:
    """One center, of which the interval of the largest loss is split until all are."""
    low, high = rows.values[:, :1], rows.values[:, -1:]
    centers = rows.improve((low + high) / 2, 1)
    while centers.shape[1] < clusters:
        edges = rows.edges(centers)
        mass, moment, square = rows.between(edges)
        loss = torch.where(mass > 0, square - moment**2 / mass, 0.0)
        worst = loss.argmax(1, keepdim=True)
        center = centers.gather(1, worst)
        cut = torch.searchsorted(rows.values, center)
        first, last = edges.gather(1, worst), edges.gather(1, worst + 1)
        cut = torch.minimum(torch.maximum(cut, first), last)
        mass, moment, _ = rows.between(torch.cat([first, cut, last], 1))
        halves = torch.where(mass > 0, moment / mass, center)
        centers = centers.scatter(1, worst, halves[:, :1])
        centers = torch.cat([centers, halves[:, 1:]], 1).sort(1).values
        centers = rows.improve(centers, _STEPS_BETWEEN_SPLITS)
    return centers
