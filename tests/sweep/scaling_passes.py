"""Passes that multiply weights, for tests of the sweep."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from qcompiler.ir.graph import Graph, Site, is_op
from qcompiler.ir.segments import Segment
from qcompiler.numerics.scheme import Scheme
from qcompiler.passes import RTN
from qcompiler.protocol.pass_base import (
    Effect,
    Pass,
    PassContext,
    PassResult,
    Rescale,
    Tap,
    Wave,
)
from qcompiler.protocol.statistics import Gram, Statistic
from qcompiler.sweep.position import Batch
from qcompiler.sweep.streaming import SweepReport, sweep

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Scale(Pass):
    """Multiplies weights; ``log`` gets what it was given: (pass, site names, matrix by kind and node name)."""

    factor: float = 1.5
    log: list["Entry"] = field(default_factory=list)
    kinds: tuple[type[Statistic], ...] = (Gram,)
    effect: ClassVar[Effect] = Effect.APPROXIMATE

    def waves(self, segment: Segment, graph: Graph) -> list[Wave]:
        return list(segment.waves())

    def statistics(self, wave: Wave, graph: Graph) -> list[Tap]:
        return [Tap(value, kind) for site in wave for value in site.inputs for kind in self.kinds]

    def rewrite(self, wave: Wave, statistics: Mapping[Tap, Any], context: PassContext) -> PassResult:
        moments = {(tap.kind, tap.value.name): statistic.result() for tap, statistic in statistics.items()}
        self.log.append((self, [site.name for site in wave], moments))
        return self.change(context.graph, wave)

    def change(self, graph: Graph, wave: Wave) -> PassResult:
        for site in wave:
            graph.weights.set(site.weight, graph.weights.read(site.weight) * self.factor)
        return PassResult(modified=True)


Entry = tuple[Scale, list[str], dict[tuple[type[Statistic], str], Tensor]]


class ScaleTogether(Scale):
    """Takes all sites of a segment at once."""

    def waves(self, segment: Segment, graph: Graph) -> list[Wave]:
        return [segment.sites] if segment.sites else []


class ScaleUnseen(Scale):
    """Needs no statistics."""

    statistics = Pass.statistics


class FoldIntoNorm(Scale):
    """Moves the factor from the sites that read from a norm into that norm."""

    effect: ClassVar[Effect] = Effect.EXACT
    rewrites_upstream: ClassVar[bool] = True

    def change(self, graph: Graph, wave: Wave) -> PassResult:
        norms: set[fx.Node] = set()
        for site in wave:
            (source,) = site.inputs
            if is_op(source, torch.ops.qcompiler.rms_norm.default):
                graph.weights.set(site.weight, graph.weights.read(site.weight) / self.factor)
                norms.add(source)
        for norm in norms:
            name = str(norm.all_input_nodes[1].target)
            graph.weights.set(name, graph.weights.read(name) * self.factor)
        scaled = {
            norm: torch.full(graph.weights.info(str(norm.all_input_nodes[1].target)).shape, self.factor)
            for norm in norms
        }
        changes = {Tap(norm, kind): Rescale(factor) for norm, factor in scaled.items() for kind in self.kinds}
        return PassResult(modified=bool(norms), statistics=changes)


class Quantize(Scale):
    """Replaces weights by codes, so that nodes are added to the graph."""

    def change(self, graph: Graph, wave: Wave) -> PassResult:
        for site in wave:
            graph.schemes[site.name] = Scheme.parse("w3a16-channel")
        return RTN().rewrite(wave, {}, PassContext(graph, CPU, 0))


def run(graph: Graph, passes: Sequence[Pass], batches: Sequence[Batch], work_dir: Path, **options: Any) -> SweepReport:
    return sweep(graph, passes, batches, PassContext(graph, CPU, 0), work_dir=work_dir, **options)


def site_named(graph: Graph, name: str) -> Site:
    return next(site for site in graph.sites() if site.name == name)
