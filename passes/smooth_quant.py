"""`SmoothQuant`: moves the outliers of activations into the weights that read them, so that both fit eight bits."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from qcompiler import numerics
from qcompiler.ir import Graph, Site
from qcompiler.numerics import QuantSpec
from qcompiler.passes.solvers.scale_regions import (
    Choice,
    InputStatistics,
    ScaleRegions,
    clamped,
)
from qcompiler.proofs import Consumer, Region, consumer_scale, per_channel
from qcompiler.protocol import AbsMax, PassContext, RowSample, Statistic, Within

__all__ = ["SmoothQuant"]

_GRID = tuple(step / 20 for step in range(21))
_REACHES = (1.0, 0.85, 0.7, 0.55, 0.4)
"""Shares of the largest magnitude that the codes may cover; what lies beyond is clipped."""


@dataclass(frozen=True)
class SmoothQuant(ScaleRegions):
    """Folds a scale per input channel between the weights of a region, so that activations lose their outliers.

    ``linear(norm(x, w), W)`` becomes ``linear(norm(x, w / s), W diag(s))`` with ``s = max|x|^a / max|W|^(1-a)`` per
    channel: the same function, whose activations have a smaller range and whose weights a larger one.

    With ``alpha=None`` the exponent is chosen per region, 0 to 1 in steps of 0.05 and no scale at all among the
    candidates, by trying it on a sample of rows ``x``: the sum over rows and layers of

        ``|Q(x / s) Q(W diag(s))ᵀ - x Wᵀ|² / (|x Wᵀ|² + mean |x Wᵀ|²)``

    Relative to the row's own output, because what follows is normalized: an absolute error would let a few large rows
    decide alone.

    Layers count whose activations are integers; those of floating-point formats have a relative precision that a scale
    does not change. Regions are proved on the graph (`qcompiler.proofs.regions`).

    Attributes:
        alpha: the migration strength, from 0 (activations stay) to 1 (weights take all); None: searched per region.

    Raises:
        RecipeError: for another alpha.

    Source: arXiv 2211.10438, equation 4. Differs: all proved regions, not those behind a norm alone; the search, where
    the paper takes one exponent for a model.
    """

    alpha: Annotated[float, Within(0, 1)] | None = None

    @property
    def kinds(self) -> tuple[type[Statistic], ...]:
        """The largest magnitudes and, to search, some rows."""
        return (AbsMax, RowSample) if self.alpha is None else (AbsMax,)

    def counts(self, graph: Graph, site: Site) -> bool:
        """Layers whose input will be quantized to integers."""
        scheme = graph.schemes.get(site.name)
        return scheme is not None and scheme.activation is not None and not scheme.activation.is_float

    def choose(
        self, region: Region, readers: list[Consumer], statistics: Mapping[str, InputStatistics], context: PassContext
    ) -> Choice:
        """The scale for the given alpha, or for the one with the least expected error."""
        weights = [context.weight(reader.site) for reader in readers]
        inputs = [statistics[reader.site.name] for reader in readers]
        activation = torch.stack(
            [per_channel(region, r, _largest(i), "amax") for r, i in zip(readers, inputs, strict=True)]
        ).amax(0)
        weight = torch.stack(
            [per_channel(region, r, w.abs().amax(0), "amax") for r, w in zip(readers, weights, strict=True)]
        ).amax(0)

        def candidate(alpha: float) -> Tensor:
            return clamped(activation**alpha / weight ** (1 - alpha))

        if self.alpha is not None:
            return Choice(candidate(self.alpha), "", {"alpha": self.alpha})

        def error(scale: Tensor) -> float:
            given = zip(readers, weights, inputs, strict=True)
            return sum(_tried(region, reader, scale, w, of_input, context) for reader, w, of_input in given)

        plain = least = error(torch.ones(region.size))
        best: Tensor | None = None
        chosen: float | None = None
        for alpha in _GRID:
            found = error(candidate(alpha))
            if found < least:
                best, least, chosen = candidate(alpha), found, alpha
        details = {"alpha": chosen, "expected_error_ratio": least / plain if plain else 1.0}
        return Choice(best, "no migration lowers the expected error" if best is None else "", details)


def _largest(statistics: InputStatistics) -> Tensor:
    assert statistics.largest is not None
    return statistics.largest


def _tried(
    region: Region, reader: Consumer, scale: Tensor, weight: Tensor, statistics: InputStatistics, context: PassContext
) -> float:
    """The relative squared error of a layer's output, summed over sampled rows, with weight and input rounded."""
    scheme = context.graph.schemes[reader.site.name]
    assert scheme.activation is not None
    assert statistics.sample is not None
    columns = consumer_scale(region, reader, scale).to(weight.device)
    scaled = weight * columns
    if scheme.weight is not None:
        qparams = numerics.min_max_qparams(scaled, scheme.weight, context.scale_dtype(reader.site))
        scaled = numerics.fake_quantize(scaled, *qparams, scheme.weight)
    rounded = _rounded(statistics.sample / columns, (_largest(statistics) / columns).max(), scheme.activation)
    exact = torch.mm(statistics.sample, weight.T)
    energy = exact.square().sum(-1)
    wrong = torch.mm(rounded, scaled.T).sub_(exact).square_().sum(-1)
    return float((wrong / (energy + energy.mean()).clamp(min=torch.finfo(torch.float32).tiny)).sum(dtype=torch.float64))


def _rounded(rows: Tensor, largest: Tensor, spec: QuantSpec) -> Tensor:
    """Activations ``[rows, channels]`` rounded to steps that cover the range with the least squared error."""
    if spec.granularity == "per_group":
        groups = rows.split(spec.group_of(rows.shape[-1]), dim=-1)
        return torch.cat([_to_steps(group, group.abs().amax(-1, keepdim=True), spec) for group in groups], dim=-1)
    if spec.granularity == "per_token":
        return _to_steps(rows, rows.abs().amax(-1, keepdim=True), spec)
    tried = [_to_steps(rows, largest * reach, spec) for reach in _REACHES]
    return min(tried, key=lambda rounded: float((rounded - rows).square().sum(dtype=torch.float64)))


def _to_steps(rows: Tensor, reach: Tensor, spec: QuantSpec) -> Tensor:
    step = (2 * reach / (spec.quant_max - spec.quant_min)).clamp(min=torch.finfo(torch.float32).tiny)
    return (rows / step).round_().mul_(step).clamp_(-reach, reach)
