"""Weighted one-dimensional k-means against dynamic programming written out, value by value."""

import pytest
import torch
from torch import Tensor

from qcompiler.passes.solvers import kmeans as _kmeans
from qcompiler.passes.solvers.kmeans import cluster, nearest


def error(values: Tensor, weights: Tensor, centers: Tensor) -> float:
    """The weighted squared distance of one row from its nearest centers."""
    distance = (values.double()[:, None] - centers.double()).square().amin(-1)
    return float((weights.double() * distance).sum())


def least_error(values: Tensor, weights: Tensor, levels: int) -> float:
    """The best there is: every way to cut the sorted values into runs, by dynamic programming in plain Python."""
    pairs = sorted(zip(values.double().tolist(), weights.double().tolist(), strict=True))

    def run(begin: int, end: int) -> float:
        inside = pairs[begin:end]
        total = sum(h for _, h in inside)
        if total == 0:
            return 0.0
        center = sum(h * x for x, h in inside) / total
        return sum(h * (x - center) ** 2 for x, h in inside)

    best = [run(0, end) for end in range(len(pairs) + 1)]
    for _ in range(levels - 1):
        best = [min(best[begin] + run(begin, end) for begin in range(end + 1)) for end in range(len(pairs) + 1)]
    return best[-1]


def heavy_tailed(rows: int, width: int) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, width) ** 3, torch.rand(rows, width) ** 4


@pytest.mark.parametrize("levels", [1, 2, 4, 8])
def test_short_rows_are_solved_exactly(levels):
    values, weights = heavy_tailed(19, 23)
    centers = cluster(values, weights, levels)
    assert centers.shape == (19, levels)
    assert bool((centers.diff(dim=-1) >= 0).all())
    for x, h, c in zip(values, weights, centers, strict=True):
        assert error(x, h, c) == pytest.approx(least_error(x, h, levels), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("levels", [4, 8, 16])
def test_long_rows_come_within_a_percent(monkeypatch, levels):
    values, weights = heavy_tailed(12, 400)
    found = cluster(values, weights, levels)
    monkeypatch.setattr(_kmeans, "_PLACES", 400)
    exact = cluster(values, weights, levels)
    ratios = [
        error(*row[:3]) / error(row[0], row[1], row[3]) for row in zip(values, weights, found, exact, strict=True)
    ]
    assert min(ratios) > 1 - 1e-6
    assert max(ratios) < 1.03
    assert sum(ratios) / len(ratios) < 1.005


@pytest.mark.parametrize("width", [40, 300])
def test_never_worse_than_even_steps(width):
    values, weights = heavy_tailed(16, width)
    centers = cluster(values, weights, 8)
    for x, h, c in zip(values, weights, centers, strict=True):
        assert error(x, h, c) < error(x, h, torch.linspace(float(x.min()), float(x.max()), 8))


def test_ratios_of_weights_alone_matter():
    values, weights = heavy_tailed(5, 30)
    factors = torch.tensor([1e-12, 1e-3, 1.0, 1e3, 1e12])[:, None]
    torch.testing.assert_close(cluster(values, weights, 4), cluster(values, weights * factors, 4), rtol=1e-6, atol=1e-9)
    shared = weights[:1]
    assert torch.equal(cluster(values, shared, 4), cluster(values, shared.expand(5, 30), 4))
    zero, one = torch.zeros(1, 30), torch.ones(1, 30)
    assert torch.equal(cluster(values, zero, 4), cluster(values, one, 4))


@pytest.mark.parametrize("width", [12, 300])
def test_fewer_distinct_values_than_centers(width):
    few = torch.tensor([-3.0, 0.5, 0.75])
    values = few[torch.randint(3, (4, width))]
    values[:, :3] = few
    values[3] = 7.25  # a constant row
    centers = cluster(values, torch.rand(4, width), 8)
    assert bool(centers.isfinite().all())
    table = centers.float()
    assert torch.equal(table.gather(1, nearest(values, table).long()), values)
    assert not cluster(torch.zeros(2, width), torch.ones(2, width), 4).any()


def test_values_that_do_not_count_are_passed_over():
    values = torch.tensor([[1.0, 1.1, 5.0, 5.1, 90.0, -70.0]])
    weights = torch.tensor([[1.0, 1.0, 1.0, 1.0, 0.0, 0.0]])
    centers = cluster(values, weights, 2)
    torch.testing.assert_close(centers, torch.tensor([[1.05, 5.05]], dtype=torch.float64), atol=1e-6, rtol=0)
    values, weights = heavy_tailed(3, 120)
    apart = torch.rand(3, 120) < 0.1
    found = cluster(torch.where(apart, 1e4 * values, values), weights.masked_fill(apart, 0), 4)
    for x, h, out, c in zip(values, weights, apart, found, strict=True):
        assert error(x[~out], h[~out], c) <= 1.01 * least_error(x[~out], h[~out], 4)


def test_rows_do_not_depend_on_one_another(monkeypatch):
    values, weights = heavy_tailed(21, 300)
    whole = cluster(values, weights, 8)
    monkeypatch.setattr(_kmeans, "_ROWS", 5)
    torch.testing.assert_close(cluster(values, weights, 8), whole, rtol=1e-9, atol=1e-12)
    assert torch.equal(whole, torch.cat([cluster(values[:8], weights[:8], 8), cluster(values[8:], weights[8:], 8)]))


def test_nearest():
    table = torch.tensor([[-1.0, 0.0, 4.0], [2.0, 2.0, 3.0]])
    values = torch.tensor([[-9.0, -0.5, -0.4, 1.9, 2.1, 9.0], [2.0, 2.4, 2.6, 3.0, -1.0, 9.0]])
    codes = nearest(values, table)
    assert codes.dtype == torch.uint8
    assert codes[0].tolist() == [0, 0, 1, 1, 2, 2]
    assert table.gather(1, codes.long())[1].tolist() == [2.0, 2.0, 3.0, 3.0, 2.0, 3.0]
