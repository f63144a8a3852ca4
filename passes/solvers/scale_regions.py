"""What the passes that fold scales into regions share: they differ in how a scale is chosen."""

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from qcompiler.errors import CalibrationError
from qcompiler.ir import Graph, Segment, Site
from qcompiler.proofs import (
    Consumer,
    Region,
    Regions,
    find_regions,
    fold_scale,
    input_factors,
)
from qcompiler.protocol import (
    CANONICAL,
    FLOAT_ACTIVATIONS,
    FLOAT_WEIGHTS,
    SCHEMES,
    AbsMax,
    Effect,
    Gram,
    Pass,
    PassContext,
    PassResult,
    Rescale,
    RowSample,
    Statistic,
    Tap,
    Wave,
)

__all__ = ["Choice", "InputStatistics", "ScaleRegions", "clamped"]

_KINDS = (Gram, AbsMax, RowSample)
_LARGEST_RATIO = 2.0**20
"""Between the largest and the smallest scale of a region: beyond, float32 would begin to lose what is small."""


@dataclass(frozen=True)
class InputStatistics:
    """The statistics of the input of a site, folds already made included.

    Attributes:
        rows: how many were seen.
        gram: float32 ``[in, in]``, its second moments.
        largest: float32 ``[in]``, the largest magnitude of each channel.
        sample: float32 ``[rows, in]``, some of its rows.

    Each is None where the pass did not ask for it.
    """

    rows: int
    gram: Tensor | None
    largest: Tensor | None
    sample: Tensor | None


@dataclass(frozen=True)
class Choice:
    """A scale for a region.

    Attributes:
        scale: float32 ``[region.size]``; None to leave the region as it is.
        reason: why it is left.
        details: for the report, plain JSON values.
    """

    scale: Tensor | None
    reason: str
    details: dict[str, Any]


@dataclass(frozen=True)
class ScaleRegions(Pass, ABC):
    """Folds a scale into every region of a segment.

    A pass implements `counts`, `kinds` and `choose`.
    """

    effect: ClassVar[Effect] = Effect.EXACT
    requires: ClassVar[frozenset[str]] = frozenset({CANONICAL, SCHEMES, FLOAT_WEIGHTS, FLOAT_ACTIVATIONS})
    rewrites_upstream: ClassVar[bool] = True

    @property
    @abstractmethod
    def kinds(self) -> tuple[type[Statistic], ...]:
        """The statistics wanted of every input, among `Gram`, `AbsMax` and `RowSample`."""

    @abstractmethod
    def counts(self, graph: Graph, site: Site) -> bool:
        """Whether a layer has a say in the scale of its region; the others take it along."""

    @abstractmethod
    def choose(
        self, region: Region, readers: list[Consumer], statistics: Mapping[str, InputStatistics], context: PassContext
    ) -> Choice:
        """Chooses the scale of a region.

        Args:
            region: in float still.
            readers: its consumers that count, at least one.
            statistics: of their inputs, by site.
            context: as in `Pass.rewrite`.
        """

    def waves(self, segment: Segment, graph: Graph) -> list[Wave]:
        """The sites that read from a region and count, all at once; none, where there are just reasons to report."""
        regions = _regions(graph, segment)
        readers = {consumer.site.name for region in regions.found for consumer in region.consumers}
        sites = [site for site in segment.sites if site.name in readers and self.counts(graph, site)]
        return [sites] if regions.found or regions.refused else []

    def statistics(self, wave: Wave, graph: Graph) -> list[Tap]:
        """`kinds` at every distinct input."""
        return [Tap(value, kind) for site in wave for value in site.inputs for kind in self.kinds]

    def rewrite(self, wave: Wave, statistics: Mapping[Tap, Any], context: PassContext) -> PassResult:
        """Chooses and folds region after region."""
        assert context.segment is not None
        regions = _regions(context.graph, context.segment)
        entries = _entries(regions)
        counted = {site.name for site in wave}
        factors: dict[fx.Node, Tensor] = {}
        for region in regions.found:
            readers = [consumer for consumer in region.consumers if consumer.site.name in counted]
            if not readers:
                entries[region.name]["reason"] = "none of its layers is quantized in a way that a scale would help"
                continue
            start = time.perf_counter()
            inputs = {reader.site.name: _input_statistics(reader.site, statistics, factors) for reader in readers}
            readers = [reader for reader in readers if inputs[reader.site.name].rows]
            if not readers:
                entries[region.name]["reason"] = "calibration never reached its layers"
                continue
            choice = self.choose(region, readers, inputs, context)
            if choice.scale is not None:
                fold_scale(context.graph, region, choice.scale)
                for value, factor in input_factors(region, choice.scale).items():
                    factors[value] = factors.get(value, torch.ones(())) * factor
            entries[region.name] |= {
                "status": "found" if choice.scale is None else "folded",
                "reason": choice.reason,
                "details": {
                    **entries[region.name]["details"],
                    **choice.details,
                    "method": self.name,
                    "seconds": time.perf_counter() - start,
                },
            }
        changes = {Tap(value, kind): Rescale(f) for value, f in factors.items() for kind in _KINDS}
        return PassResult(modified=bool(factors), statistics=changes, regions=tuple(entries.values()))


def clamped(scale: Tensor) -> Tensor:
    """A scale made positive, centred on 1 (geometric mean of its extremes), and bounded.

    A channel that never carries anything, where the scale is zero or not finite, gets 1.
    """
    good = scale.isfinite() & (scale > 0)
    if not bool(good.any()):
        return torch.ones_like(scale)
    low, high = scale[good].min(), scale[good].max()
    half = _LARGEST_RATIO**0.5
    return torch.where(good, (scale / (low.sqrt() * high.sqrt())).clamp(1 / half, half), 1.0)


def _regions(graph: Graph, segment: Segment) -> Regions:
    """The regions that lie wholly in a segment."""
    return find_regions(graph, segment.nodes())


def _input_statistics(site: Site, statistics: Mapping[Tap, Any], factors: Mapping[fx.Node, Tensor]) -> InputStatistics:
    found: dict[type[Statistic], Tensor] = {}
    rows = 0
    for kind in _KINDS:
        total = kind()
        for value in site.inputs:
            if Tap(value, kind) not in statistics:
                continue
            part = kind()
            part.merge(statistics[Tap(value, kind)])
            if value in factors:
                part.rescale(factors[value])
            total.merge(part)  # type: ignore[arg-type]
        if total.rows == 0:
            continue
        rows, found[kind] = total.rows, total.result()
        if not bool(found[kind].isfinite().all()):
            raise CalibrationError(
                "an activation is not finite",
                where=site.name,
                got=f"NaN or infinity in its {kind.__name__}",
                remedy="look for NaN, infinity or overflow in the layers before",
            )
    return InputStatistics(rows, found.get(Gram), found.get(AbsMax), found.get(RowSample))


def _entries(regions: Regions) -> dict[str, dict[str, Any]]:
    """One report entry for every region, and one for every producer that is in none."""
    entries: dict[str, dict[str, Any]] = {}
    for region in regions.found:
        entries[region.name] = {
            "name": region.name,
            "kind": " and ".join(sorted({producer.kind for producer in region.producers})),
            "producers": [producer.name for producer in region.producers],
            "consumers": [consumer.site.name for consumer in region.consumers],
            "channels": region.size,
            "status": "found",
            "reason": "",
            "details": {"left_out": list(region.notes)} if region.notes else {},
        }
    for refusal in regions.refused:
        entries[refusal.producer] = {
            "name": refusal.producer,
            "kind": "",
            "producers": [refusal.producer],
            "consumers": [],
            "channels": 0,
            "status": "refused",
            "reason": refusal.reason,
            "details": {},
        }
    return entries
