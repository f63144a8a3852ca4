"""`InsertQDQ`: quantizes activations where they enter linear layers."""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, TypeVar

import torch
from torch import Tensor, fx

from qcompiler.errors import RecipeError
from qcompiler.ir import Graph, Segment, Site, Stretch, ancestors
from qcompiler.numerics import QuantSpec
from qcompiler.passes.solvers.input_rounding import RoundingTrial, try_rounding
from qcompiler.passes.solvers.observed_inputs import (
    ObservedInput,
    activation_spec,
    observed_inputs,
    sites_that_share_a_range,
)
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
    RangeStatistic,
    RowSample,
    SiteReport,
    Skip,
    Statistic,
    Tap,
    Wave,
    Within,
    activation_qparams,
    check_range_method,
    check_range_statistic,
    choose_range,
    range_of,
    range_sqnr_db,
)

__all__ = ["InsertQDQ"]

_Kind = TypeVar("_Kind", bound=Statistic)


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
        observer: how the range is chosen (`qcompiler.protocol`): by one of the named ways, from a histogram, or by a
            class of statistics of your own, a `RangeStatistic`. None where every scheme is dynamic: no calibration. For
            NVFP4, whose scales are computed at run time relative to one factor, the factor is that of all that was
            seen, whatever this says.
        percentile: for the observer of that name, in percent.
        least_sqnr_db: of a layer's output with its input rounded, see `output_error`; below it, the input stays in
            float. None: 20 for formats of eight bits and more, 12 for fewer. ``-inf``: all are rounded.

    Error: at most half a step of the codes for values inside the range, and the excess for those outside.
    """

    observer: RangeMethod | type[RangeStatistic] | None = "mse"
    percentile: Annotated[float, Within(50, 100, above=True)] = 99.99
    least_sqnr_db: float | None = None

    effect: ClassVar[Effect] = Effect.APPROXIMATE
    requires: ClassVar[frozenset[str]] = frozenset({CANONICAL, SCHEMES})
    establishes: ClassVar[frozenset[str]] = frozenset({ACTIVATIONS_QUANTIZED})

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.observer, type):
            check_range_statistic(self.observer, "InsertQDQ.observer")
        elif self.observer is not None:
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
        taps: list[Tap] = []
        for site in wave:
            spec = activation_spec(site, graph)
            kinds: list[type[Statistic]] = [] if spec.dynamic else [Histogram, *self._own_statistic(spec)]
            taps += [Tap(value, kind) for value in site.inputs for kind in kinds]
        return [*taps, *(Tap(value, RowSample) for site in wave for value in site.inputs)]

    def rewrite(self, wave: Wave, statistics: Mapping[Tap, Any], context: PassContext) -> PassResult:
        """Quantizes the inputs of a wave: for each group of sites, chooses a range, tries it, and inserts the nodes."""
        reports: list[SiteReport] = []
        skips: list[Skip] = []
        observed = observed_inputs(wave, statistics) if self.is_calibrated else {}
        for spec, sites in sites_that_share_a_range(wave, context.graph):
            start = time.perf_counter()
            group = _Group(spec, sites, observed, statistics, context)
            if self.is_calibrated and not spec.dynamic and not group.values:
                reason = "its input stays in float: no calibration row was sent to this expert or to its fellows"
                skips += group.leave_in_float(self.name, reason)
                continue
            qparams = _QParams() if spec.dynamic else self._static_qparams(group)
            trials = group.try_rounding(qparams) if self.is_calibrated else {}
            if trials and min(trial.output_sqnr_db for trial in trials.values()) < self._least_sqnr_db(spec):
                skips += group.leave_in_float(self.name, group.describe_worst(trials, self._least_sqnr_db(spec)))
                continue
            group.insert(qparams)
            seconds = (time.perf_counter() - start) / len(sites)
            reports += [group.report(site, self.name, qparams, trials.get(site.name), seconds) for site in sites]
        return PassResult(modified=bool(reports), sites=tuple(reports), skips=tuple(skips))

    def _least_sqnr_db(self, spec: QuantSpec) -> float:
        return self.least_sqnr_db if self.least_sqnr_db is not None else 20.0 if spec.bits >= 8 else 12.0

    def _own_statistic(self, spec: QuantSpec) -> list[type[RangeStatistic]]:
        """The class that chooses ranges of a static format, where it is none of the named ways."""
        return [self.observer] if isinstance(self.observer, type) and not spec.has_factor else []

    def _static_qparams(self, group: "_Group") -> "_QParams":
        spec, first = group.spec, group.sites[0].name
        if self.observer is None:
            raise RecipeError(
                "a static range has to be calibrated",
                where=first,
                got=f"activation {spec}, and InsertQDQ(observer=None)",
                expected="a dynamic scheme, or an observer",
                remedy="InsertQDQ(observer='mse')",
            )
        histogram, details = group.merged(Histogram), dict[str, Any]()
        if own := self._own_statistic(spec):
            low, high = range_of(group.merged(own[0]), spec, first)
            details["observer"] = own[0].__name__
        else:
            method = "minmax" if spec.has_factor or isinstance(self.observer, type) else self.observer
            low, high = choose_range(histogram, spec, method, percentile=self.percentile)
        seen = histogram.result()
        scale, zero_point = activation_qparams(low, high, spec)
        sqnr = math.nan if spec.has_factor else range_sqnr_db(seen, low, high, spec)
        details |= {"range": [low, high], "seen": [seen.low, seen.high]}
        return _QParams(f"{first}.input", scale, zero_point, sqnr, details)


@dataclass(frozen=True)
class _QParams:
    """What inputs are rounded with.

    Attributes:
        name: scale and zero point are stored as ``<name>_scale`` and ``<name>_zero_point``; empty where the format is
            dynamic, and nothing is stored.
        scale, zero_point: 0-D.
        sqnr_db: signal over noise of the input, by its histogram; not a number where there is none.
        details: for the report.
    """

    name: str = ""
    scale: Tensor | None = None
    zero_point: Tensor | None = None
    sqnr_db: float = math.nan
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Group:
    """Sites of one format that share one range.

    Attributes:
        spec: the format.
        sites: in the order of the wave.
        observed: by site, the values whose statistics stand for its input; empty where nothing is calibrated.
        statistics, context: as `Pass.rewrite` is given them.
    """

    spec: QuantSpec
    sites: list[Site]
    observed: Mapping[str, ObservedInput]
    statistics: Mapping[Tap, Any]
    context: PassContext

    @property
    def values(self) -> list[fx.Node]:
        """All values whose statistics count, each once."""
        return list(dict.fromkeys(value for site in self.sites for value in self.observed[site.name].values))

    def merged(self, kind: type[_Kind]) -> _Kind:
        """One statistic of all that was seen at the inputs."""
        total = kind()
        for value in self.values:
            total.merge(self.statistics[Tap(value, kind)])
        return total

    def try_rounding(self, qparams: _QParams) -> dict[str, RoundingTrial]:
        """By site whose input is known, what rounding it would do."""
        graph, device = self.context.graph, self.context.device
        weights: dict[fx.Node, Site] = {site.nodes[0].args[1]: site for site in self.sites}  # type: ignore[misc]
        behind = ancestors(weights)
        nodes = [node for node in graph.fx.nodes if node in behind]
        loaded = Stretch(nodes, list(weights)).load(graph.weights.read, device)
        trials = {}
        for weight, site in weights.items():
            samples = [self.statistics[Tap(value, RowSample)].result() for value in self.observed[site.name].values]
            if samples:
                rows = torch.cat(samples)
                trials[site.name] = try_rounding(rows, loaded[weight], self.spec, qparams.scale, qparams.zero_point)
        return trials

    def describe_worst(self, trials: Mapping[str, RoundingTrial], least_sqnr_db: float) -> str:
        """Why inputs stay in float, with figures."""
        worst = min(trials, key=lambda site: trials[site].output_sqnr_db)
        largest = self.statistics[Tap(self.observed[worst].values[0], RowSample)].result().abs().amax(0)
        ratio = float(largest.max() / largest.median().clamp(min=torch.finfo(torch.float32).tiny))
        left, wanted = f"{trials[worst].output_sqnr_db:.1f} dB", f"{least_sqnr_db:g} are wanted"
        return (
            f"its input stays in float: {self.spec} would leave {worst} {left} of signal over noise, {wanted}; "
            f"one of {len(largest)} channels reaches {ratio:.0f} times as far as the middle one"
        )

    def leave_in_float(self, method: str, reason: str) -> list[Skip]:
        """Takes the activation out of the schemes."""
        schemes = self.context.graph.schemes
        for site in self.sites:
            schemes[site.name] = replace(schemes[site.name], activation=None)
        return [Skip(site.name, method, reason) for site in self.sites]

    def insert(self, qparams: _QParams) -> None:
        """Stores scale and zero point, and puts the nodes ahead of the layers."""
        graph = self.context.graph
        names: list[str | None] = [None, None]
        for index, (part, tensor) in enumerate((("scale", qparams.scale), ("zero_point", qparams.zero_point))):
            if tensor is not None:
                names[index] = f"{qparams.name}_{part}"
                graph.weights.set(f"{qparams.name}_{part}", tensor)
        place = {node: index for index, node in enumerate(graph.fx.nodes)}
        readers: dict[fx.Node, list[fx.Node]] = {}
        for node in sorted((node for site in self.sites for node in site.nodes), key=place.__getitem__):
            value = node.args[0]
            assert isinstance(value, fx.Node)
            readers.setdefault(value, []).append(node)
        for value, nodes in readers.items():
            graph.quantize_input(value, nodes, self.spec, names[0], names[1])

    def report(
        self, site: Site, method: str, qparams: _QParams, trial: RoundingTrial | None, seconds: float
    ) -> SiteReport:
        """What was done at one site."""
        details = {"input": f"{qparams.name}_scale" if qparams.name else "dynamic", **qparams.details}
        if site.name in self.observed and self.observed[site.name].is_borrowed:
            fallback = "range of its fellow experts: no calibration row was sent to this one"
            details |= {"calibration_rows": 0, "fallback": fallback}
        sqnr = qparams.sqnr_db
        if trial is not None:
            details["output_sqnr_db"] = trial.output_sqnr_db
            sqnr = trial.input_sqnr_db if math.isnan(sqnr) else sqnr
        return SiteReport(site.name, method, f"activation {self.spec}", sqnr, seconds=seconds, details=details)
