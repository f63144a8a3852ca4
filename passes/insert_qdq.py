"""`InsertQDQ`: quantizes activations where they enter linear layers."""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from qcompiler.errors import RecipeError, ZeroCoverageError
from qcompiler.graph import Graph, Site
from qcompiler.observers import Histogram
from qcompiler.pass_base import (
    ACTIVATIONS_QUANTIZED,
    CANONICAL,
    SCHEMES,
    Effect,
    Pass,
    PassContext,
    PassResult,
    SiteReport,
    Tap,
    Wave,
)
from qcompiler.ranges import Method, activation_qparams, check_method, choose_range, range_sqnr_db
from qcompiler.segments import Segment
from qcompiler.spec import QuantSpec

__all__ = ["InsertQDQ"]


@dataclass(frozen=True)
class InsertQDQ(Pass):
    """Rounds the inputs of linear layers as their schemes say, now, so that what follows is calibrated on it.

    ``linear(x, W)`` becomes ``linear(dequantize(quantize(x, s, z), s, z), W)``. Sites that read one value with one
    format share one pair of nodes, and sites tied together by shared values share one scale, stored as
    ``<first site>.input_scale`` and ``<first site>.input_zero_point``. Where the format is dynamic, scale and zero
    point come from ``choose_qparams`` and nothing is calibrated. Sites whose scheme leaves activations in float, and
    other operators, are left alone.

    Waves are taken in true sequence: the range of a layer's input is chosen with the activations before it rounded
    already. Standing behind a weight quantizer that needs no calibration, such as `RTN`, it costs one run of the
    segment; ahead of one that does, such as `GPTQ`, it lets that one see the rounded activations, for a second run.

    Attributes:
        observer: how the range is chosen (`qcompiler.ranges`); None where every scheme is dynamic: no calibration. For
            NVFP4, whose scales are computed at run time relative to one factor, the factor is that of all that was
            seen, whatever this says.
        percentile: for the observer of that name, in percent.

    Error: at most half a step of the codes for values inside the range, and the excess for those outside.
    """

    observer: Method | None = "mse"
    percentile: float = 99.99

    effect: ClassVar[Effect] = Effect.APPROXIMATE
    requires: ClassVar[frozenset[str]] = frozenset({CANONICAL, SCHEMES})
    establishes: ClassVar[frozenset[str]] = frozenset({ACTIVATIONS_QUANTIZED})

    def __post_init__(self) -> None:
        if self.observer is not None:
            check_method(self.observer, self.percentile)

    @property
    def is_calibrated(self) -> bool:
        """Whether ranges are chosen from statistics."""
        return self.observer is not None

    def waves(self, segment: Segment, graph: Graph) -> list[Wave]:
        """Sites with an activation format, in true sequence."""
        waves = [[site for site in wave if graph.schemes[site.name].activation is not None] for wave in segment.waves()]
        return [wave for wave in waves if wave]

    def statistics(self, wave: Wave, graph: Graph) -> list[Tap]:
        """How the inputs with a static format are distributed."""
        static = [site for site in wave if not _spec(site, graph).dynamic]
        return [Tap(value, Histogram) for site in static for value in site.inputs] if self.is_calibrated else []

    def rewrite(self, wave: Wave, statistics: Mapping[Tap, Any], context: PassContext) -> PassResult:
        """Quantizes the inputs of a wave."""
        reports: list[SiteReport] = []
        for spec, sites in _tied(wave, context.graph):
            reports += self._quantize(sites, spec, statistics, context.graph)
        return PassResult(modified=bool(reports), sites=tuple(reports))

    def _quantize(
        self, sites: list[Site], spec: QuantSpec, statistics: Mapping[Tap, Any], graph: Graph
    ) -> list[SiteReport]:
        start = time.perf_counter()
        scale: str | None = None
        zero_point: str | None = None
        sqnr = math.nan
        details: dict[str, Any] = {"input": "dynamic"}
        if not spec.dynamic:
            seen = self._observed(sites, spec, statistics)
            assert self.observer is not None
            observer = "minmax" if spec.has_factor else self.observer
            low, high = choose_range(seen, spec, observer, percentile=self.percentile)
            scale_value, zero_value = activation_qparams(low, high, spec)
            scale = f"{sites[0].name}.input_scale"
            graph.weights.set(scale, scale_value)
            if zero_value is not None:
                zero_point = f"{sites[0].name}.input_zero_point"
                graph.weights.set(zero_point, zero_value)
            sqnr = math.nan if spec.has_factor else range_sqnr_db(seen.result(), low, high, spec)
            details = {"input": scale, "range": [low, high], "seen": [seen.result().low, seen.result().high]}
        place = {node: index for index, node in enumerate(graph.fx.nodes)}
        readers: dict[fx.Node, list[fx.Node]] = {}
        for node in sorted((node for site in sites for node in site.nodes), key=place.__getitem__):
            value = node.args[0]
            assert isinstance(value, fx.Node)
            readers.setdefault(value, []).append(node)
        for value, nodes in readers.items():
            graph.quantize_input(value, nodes, spec, scale, zero_point)
        seconds = (time.perf_counter() - start) / len(sites)
        return [
            SiteReport(site.name, self.name, f"activation {spec}", sqnr, seconds=seconds, details=details)
            for site in sites
        ]

    def _observed(self, sites: list[Site], spec: QuantSpec, statistics: Mapping[Tap, Any]) -> Histogram:
        """What was seen at all inputs of some sites."""
        if not self.is_calibrated:
            raise RecipeError(
                "a static range has to be calibrated",
                where=sites[0].name,
                got=f"activation {spec}, and InsertQDQ(observer=None)",
                expected="a dynamic scheme, or an observer",
                remedy="InsertQDQ(observer='mse')",
            )
        merged = Histogram()
        for value in dict.fromkeys(value for site in sites for value in site.inputs):
            merged.merge(statistics[Tap(value, Histogram)])
        if not merged.has_seen:
            raise ZeroCoverageError(
                "calibration never reached this layer",
                where=sites[0].name,
                expected="at least one input row",
                remedy="use more or other calibration text, or leave the layer out with an override",
            )
        return merged


def _spec(site: Site, graph: Graph) -> QuantSpec:
    spec = graph.schemes[site.name].activation
    assert spec is not None
    return spec


def _tied(wave: Wave, graph: Graph) -> list[tuple[QuantSpec, list[Site]]]:
    """Sites of one format that share an input, directly or through others, together; in the order of the wave."""
    groups: list[tuple[QuantSpec, set[fx.Node], list[Site]]] = []
    for site in wave:
        spec, inputs, members = _spec(site, graph), set(site.inputs), [site]
        apart = []
        for group in groups:
            if group[0] == spec and inputs & group[1]:
                inputs |= group[1]
                members = [*group[2], *members]
            else:
                apart.append(group)
        groups = [*apart, (spec, inputs, members)]
    place = {site.name: index for index, site in enumerate(wave)}
    found = [(spec, sorted(members, key=lambda site: place[site.name])) for spec, _, members in groups]
    return sorted(found, key=lambda group: place[group[1][0].name])
