"""`InsertQDQ`: quantizes activations where they enter linear layers."""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, fx

from qcompiler import numerics
from qcompiler.errors import RecipeError, ZeroCoverageError
from qcompiler.ir import Graph, Segment, Site, Stretch, ancestors, routed_from
from qcompiler.numerics import QuantSpec
from qcompiler.passes.solvers.input_rounding import output_error, round_rows
from qcompiler.protocol import (
    ACTIVATIONS_QUANTIZED,
    CANONICAL,
    SCHEMES,
    Effect,
    Histogram,
    Pass,
    PassContext,
    PassResult,
    RangeMethod,
    RowSample,
    SiteReport,
    Skip,
    Tap,
    Wave,
    Within,
    activation_qparams,
    check_range_method,
    choose_range,
    range_sqnr_db,
)

__all__ = ["InsertQDQ"]


@dataclass(frozen=True)
class InsertQDQ(Pass):
    """Rounds the inputs of linear layers as their schemes say, now, so that what follows is calibrated on it.

    ``linear(x, W)`` becomes ``linear(dequantize(quantize(x, s, z), s, z), W)``. Sites that read one value with one
    format share one pair of nodes, and sites tied together by shared values share one scale, stored as
    ``<first site>.input_scale`` and ``<first site>.input_zero_point``. Where the format is dynamic, scale and zero
    point come from ``choose_qparams`` and no range is calibrated. Sites whose scheme leaves activations in float, and
    other operators, are left alone.

    Waves are taken in true sequence: the range of a layer's input is chosen with the activations before it rounded
    already. Standing behind a weight quantizer that needs no calibration, such as `RTN`, it costs one run of the
    segment; ahead of one that does, such as `GPTQ`, it lets that one see the rounded activations, for a second run.

    Where inputs are calibrated, a sample of them is rounded on trial. A layer whose output would keep too little signal
    over the noise is no place for rounded inputs: its outliers, which no pass ahead has tamed, take the range that all
    other channels need. Its input stays in float, as do those of the layers that share it, and the report says so
    (weights are quantized all the same). In a Llama of 7 million parameters, ordinary inputs keep 40 dB in eight bits
    and 22 in four (down projections 25 and 13); channels 64 times as large as the others bring that down to 15 and 3.

    Attributes:
        observer: how the range is chosen (`qcompiler.protocol`); None where every scheme is dynamic: no calibration.
            For NVFP4, whose scales are computed at run time relative to one factor, the factor is that of all that was
            seen, whatever this says.
        percentile: for the observer of that name, in percent.
        least_sqnr_db: of a layer's output with its input rounded, see `output_error`; below it, the input stays in
            float. None: 20 for formats of eight bits and more, 12 for fewer. ``-inf``: all are rounded.

    Error: at most half a step of the codes for values inside the range, and the excess for those outside.
    """

    observer: RangeMethod | None = "mse"
    percentile: Annotated[float, Within(50, 100, above=True)] = 99.99
    least_sqnr_db: float | None = None

    effect: ClassVar[Effect] = Effect.APPROXIMATE
    requires: ClassVar[frozenset[str]] = frozenset({CANONICAL, SCHEMES})
    establishes: ClassVar[frozenset[str]] = frozenset({ACTIVATIONS_QUANTIZED})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.observer is not None:
            check_range_method(self.observer, self.percentile)

    @property
    def is_calibrated(self) -> bool:
        """Whether static ranges are chosen from statistics, and inputs tried on a sample."""
        return self.observer is not None

    def waves(self, segment: Segment, graph: Graph) -> list[Wave]:
        """Sites with an activation format, in true sequence."""
        waves = [[site for site in wave if graph.schemes[site.name].activation is not None] for wave in segment.waves()]
        return [wave for wave in waves if wave]

    def statistics(self, wave: Wave, graph: Graph) -> list[Tap]:
        """How the inputs with a static format are distributed, and some rows of every input."""
        if not self.is_calibrated:
            return []
        static = [site for site in wave if not _spec(site, graph).dynamic]
        distributions = [Tap(value, Histogram) for site in static for value in site.inputs]
        return [*distributions, *(Tap(value, RowSample) for site in wave for value in site.inputs)]

    def rewrite(self, wave: Wave, statistics: Mapping[Tap, Any], context: PassContext) -> PassResult:
        """Quantizes the inputs of a wave."""
        reports: list[SiteReport] = []
        skips: list[Skip] = []
        seen_at = _seen_at(wave, statistics) if self.is_calibrated else {}
        for spec, sites in _tied(wave, context.graph):
            start = time.perf_counter()
            if not spec.dynamic and self.is_calibrated and not any(seen_at[site.name].values for site in sites):
                skips += _leave_unreached(sites, self.name, context.graph)
                continue
            chosen = self._range(sites, spec, statistics, seen_at)
            noise = _tried(sites, spec, chosen, statistics, seen_at, context) if self.is_calibrated else {}
            if noise and min(tried.output_sqnr_db for tried in noise.values()) < self._least_sqnr_db(spec):
                skips += self._leave(sites, spec, noise, statistics, seen_at, context.graph)
                continue
            _insert(sites, spec, chosen, context.graph)
            seconds = (time.perf_counter() - start) / len(sites)
            for site in sites:
                details = {"input": f"{chosen.name}_scale" if chosen.name else "dynamic", **chosen.details}
                if self.is_calibrated and seen_at[site.name].is_borrowed:
                    details |= _BORROWED
                sqnr = chosen.sqnr_db
                if site.name in noise:
                    details["output_sqnr_db"] = noise[site.name].output_sqnr_db
                    sqnr = noise[site.name].sqnr_db if math.isnan(sqnr) else sqnr
                reports.append(
                    SiteReport(site.name, self.name, f"activation {spec}", sqnr, seconds=seconds, details=details)
                )
        return PassResult(modified=bool(reports), sites=tuple(reports), skips=tuple(skips))

    def _least_sqnr_db(self, spec: QuantSpec) -> float:
        return self.least_sqnr_db if self.least_sqnr_db is not None else 20.0 if spec.bits >= 8 else 12.0

    def _range(self, sites: list[Site], spec: QuantSpec, statistics: Mapping[Tap, Any], seen_at: "_SeenAt") -> "_Range":
        if spec.dynamic:
            return _Range()
        seen = self._observed(sites, spec, statistics, seen_at)
        assert self.observer is not None
        low, high = choose_range(seen, spec, "minmax" if spec.has_factor else self.observer, percentile=self.percentile)
        scale, zero_point = activation_qparams(low, high, spec)
        sqnr = math.nan if spec.has_factor else range_sqnr_db(seen.result(), low, high, spec)
        details = {"range": [low, high], "seen": [seen.result().low, seen.result().high]}
        return _Range(f"{sites[0].name}.input", scale, zero_point, sqnr, details)

    def _leave(
        self,
        sites: list[Site],
        spec: QuantSpec,
        noise: Mapping[str, "_Noise"],
        statistics: Mapping[Tap, Any],
        seen_at: "_SeenAt",
        graph: Graph,
    ) -> list[Skip]:
        """Takes the activation out of the schemes of some sites, and says why."""
        worst = min(noise, key=lambda site: noise[site].output_sqnr_db)
        value = seen_at[worst].values[0]
        largest = statistics[Tap(value, RowSample)].result().abs().amax(0)
        ratio = float(largest.max() / largest.median().clamp(min=torch.finfo(torch.float32).tiny))
        left, wanted = f"{noise[worst].output_sqnr_db:.1f} dB", f"{self._least_sqnr_db(spec):g} are wanted"
        reason = (
            f"its input stays in float: {spec} would leave {worst} {left} of signal over noise, {wanted}; "
            f"one of {len(largest)} channels reaches {ratio:.0f} times as far as the middle one"
        )
        for site in sites:
            graph.schemes[site.name] = replace(graph.schemes[site.name], activation=None)
        return [Skip(site.name, self.name, reason) for site in sites]

    def _observed(
        self, sites: list[Site], spec: QuantSpec, statistics: Mapping[Tap, Any], seen_at: "_SeenAt"
    ) -> Histogram:
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
        for value in dict.fromkeys(value for site in sites for value in seen_at[site.name].values):
            merged.merge(statistics[Tap(value, Histogram)])
        return merged


@dataclass(frozen=True)
class _Range:
    """What inputs are rounded with: stored tensors ``<name>_scale`` and ``<name>_zero_point``, or nothing (dynamic)."""

    name: str = ""
    scale: Tensor | None = None
    zero_point: Tensor | None = None
    sqnr_db: float = math.nan
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Noise:
    """What rounding does to a sample: signal over noise of the input, and of the layer's output (`output_error`)."""

    sqnr_db: float
    output_sqnr_db: float


@dataclass(frozen=True)
class _Seen:
    """The values whose statistics stand for the input of a site: its own, or those of other experts."""

    values: tuple[fx.Node, ...]
    is_borrowed: bool = False


_SeenAt = Mapping[str, _Seen]
_BORROWED = {"calibration_rows": 0, "fallback": "range of its fellow experts: no calibration row was sent to this one"}


def _seen_at(wave: Wave, statistics: Mapping[Tap, Any]) -> dict[str, _Seen]:
    """What calibration saw of each site's input; of an expert that got no row, what it saw of its fellows'.

    Raises:
        ZeroCoverageError: for a site without any that is no expert: then the calibration is at fault, not the routing.
    """
    own = {site.name: tuple(v for v in site.inputs if statistics[Tap(v, RowSample)].rows) for site in wave}
    found = {site.name: _Seen(own[site.name]) for site in wave}
    for site in wave:
        if own[site.name]:
            continue
        mixture = routed_from(site)
        if not mixture:
            raise ZeroCoverageError(
                "calibration never reached this layer",
                where=site.name,
                expected="at least one input row",
                remedy="use more or other calibration text, or leave the layer out with an override",
            )
        needs_range = any(Tap(value, Histogram) in statistics for value in site.inputs)
        values = [
            value
            for other in wave
            if routed_from(other) == mixture
            for value in own[other.name]
            if not needs_range or Tap(value, Histogram) in statistics
        ]
        found[site.name] = _Seen(tuple(dict.fromkeys(values)), is_borrowed=True)
    return found


def _leave_unreached(sites: list[Site], by: str, graph: Graph) -> list[Skip]:
    """Leaves inputs in float whose range nothing tells: a mixture of experts that got no row at all."""
    for site in sites:
        graph.schemes[site.name] = replace(graph.schemes[site.name], activation=None)
    reason = "its input stays in float: no calibration row was sent to this expert or to its fellows"
    return [Skip(site.name, by, reason) for site in sites]


def _tried(
    sites: list[Site],
    spec: QuantSpec,
    chosen: _Range,
    statistics: Mapping[Tap, Any],
    seen_at: _SeenAt,
    context: PassContext,
) -> dict[str, _Noise]:
    """By site whose input is known, what rounding it would do."""
    weights: dict[fx.Node, Site] = {site.nodes[0].args[1]: site for site in sites}  # type: ignore[misc]
    behind = ancestors(weights)
    nodes = [node for node in context.graph.fx.nodes if node in behind]
    loaded = Stretch(nodes, list(weights)).load(context.graph.weights.read, context.device)
    found = {}
    for weight, site in weights.items():
        rows = [statistics[Tap(value, RowSample)].result() for value in seen_at[site.name].values]
        if rows:
            joined = torch.cat(rows)
            rounded = round_rows(joined, spec, chosen.scale, chosen.zero_point)
            share = output_error(joined, rounded, loaded[weight])
            output = -10 * math.log10(share) if share else math.inf
            found[site.name] = _Noise(numerics.sqnr_db(joined, rounded), output)
    return found


def _insert(sites: list[Site], spec: QuantSpec, chosen: _Range, graph: Graph) -> None:
    names: list[str | None] = [None, None]
    for index, (part, tensor) in enumerate((("scale", chosen.scale), ("zero_point", chosen.zero_point))):
        if tensor is not None:
            names[index] = f"{chosen.name}_{part}"
            graph.weights.set(f"{chosen.name}_{part}", tensor)
    place = {node: index for index, node in enumerate(graph.fx.nodes)}
    readers: dict[fx.Node, list[fx.Node]] = {}
    for node in sorted((node for site in sites for node in site.nodes), key=place.__getitem__):
        value = node.args[0]
        assert isinstance(value, fx.Node)
        readers.setdefault(value, []).append(node)
    for value, nodes in readers.items():
        graph.quantize_input(value, nodes, spec, names[0], names[1])


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
