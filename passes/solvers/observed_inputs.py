"""Which layers share the range of their inputs, and which values' statistics that range is chosen from."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx

from qcompiler.errors import ZeroCoverageError
from qcompiler.ir import Graph, Site, routed_from
from qcompiler.numerics import QuantSpec
from qcompiler.protocol import Histogram, RowSample, Tap, Wave

__all__ = ["ObservedInput", "activation_spec", "observed_inputs", "sites_that_share_a_range"]


@dataclass(frozen=True)
class ObservedInput:
    """The values whose statistics stand for the input of a site.

    Attributes:
        values: its own inputs that calibration reached, or those of other experts of its mixture; none where no row
            was sent to any of them.
        is_borrowed: they are those of other experts.
    """

    values: tuple[fx.Node, ...]
    is_borrowed: bool = False


def activation_spec(site: Site, graph: Graph) -> QuantSpec:
    """The format of the input of a site that has one."""
    spec = graph.schemes[site.name].activation
    assert spec is not None
    return spec


def sites_that_share_a_range(wave: Wave, graph: Graph) -> list[tuple[QuantSpec, list[Site]]]:
    """Sites of one format that share an input, directly or through others, together; in the order of the wave."""
    groups: list[tuple[QuantSpec, set[fx.Node], list[Site]]] = []
    for site in wave:
        spec, inputs, members = activation_spec(site, graph), set(site.inputs), [site]
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


def observed_inputs(wave: Wave, statistics: Mapping[Tap, Any]) -> dict[str, ObservedInput]:
    """By site, what calibration saw of its input; of an expert that got no row, what it saw of its fellows'.

    Args:
        wave: sites.
        statistics: a `RowSample` of every input, and a `Histogram` of those that a range is chosen for.

    Raises:
        ZeroCoverageError: for a site without any that is no expert: then the calibration is at fault, not the routing.
    """
    own = {site.name: tuple(v for v in site.inputs if statistics[Tap(v, RowSample)].rows) for site in wave}
    found = {site.name: ObservedInput(own[site.name]) for site in wave}
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
        found[site.name] = ObservedInput(tuple(dict.fromkeys(values)), is_borrowed=True)
    return found
