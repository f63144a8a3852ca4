"""How far the batches have run inside one segment: on to the next wave, and back where a rewrite makes it necessary.

A segment is never run as a whole. The batches stand at a *frontier*: some of its nodes have been executed, and the
values alive there, which nodes ahead read, wait in a `ValueStore`: in memory up to a budget, spilled to files beyond.
Values inside a segment are forgotten once nothing ahead reads them; between two segments only those at the cut wait.

    cut ──── gather ───▶ frontier ──── gather ───▶ frontier ──── finish ───▶ cut
     ▲                   (a wave)                  (the next)
     └──── rewind, where something behind has been rewritten ────┘

There are two *lanes*. The working lane is the model as passes have rewritten it so far. The reference lane is the same
model without anything approximate: float weights in the place of quantized ones, activations and caches not rounded.
Only statistics that ask for it need the second one; until something approximate lies behind the batches, both lanes are
the same values, and nothing is executed twice.

The first batches may be probes: inputs that serve only to check that an exact pass keeps what the segment computes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from qcompiler.ir import Graph, Segment, Site, Stretch, activation_rounding, cache_rounding, empty_cache
from qcompiler.protocol import Statistic, Tap, Wave
from qcompiler.sweep.value_store import ValueHandle, ValueStore

__all__ = ["Batch", "Frontier", "OutsideValues", "Position", "SweepContext", "original_name"]

Batch = Mapping[fx.Node, Tensor]
"""One value per placeholder of the graph."""

_Values = Mapping[fx.Node, Any]
_Take = Callable[[_Values, _Values], None]
"""Given the values of one batch in both lanes."""


class OutsideValues:
    """Gives, for a batch, what segments read that no segment computes: inputs of the graph, masks, rotary tables.

    Args:
        graph: being rewritten.
        prologue: the nodes that do not depend on the tokens themselves.
        device: where they are computed, once for every shape, mask and positions.
    """

    def __init__(self, graph: Graph, prologue: Sequence[fx.Node], device: torch.device) -> None:
        self._graph, self._device = graph, device
        self._stretch = Stretch(list(graph.fx.nodes), [*prologue])
        sizes = torch.ops.aten.sym_size.int
        self._reads = {
            source for node in self._stretch.nodes if node.target is not sizes for source in node.all_input_nodes
        }
        self._computed: dict[tuple[object, ...], dict[fx.Node, Any]] = {}
        self._weights = self._stretch.load(graph.weights.read, device)

    def __call__(self, batch: Batch) -> dict[fx.Node, Any]:
        """The values, by node."""
        key: list[object] = []
        for node, value in batch.items():
            key.append(value.shape)
            if node in self._reads:
                key.append(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        values = self._computed.get(tuple(key))
        if values is None:
            values = self._stretch.run(batch, self._weights, self._device)
            self._computed[tuple(key)] = values
        return {**batch, **values, **self._new_caches(batch)}

    def _new_caches(self, batch: Batch) -> dict[fx.Node, Tensor]:
        """What the ports take that a cache was given after the batches were made."""
        ports = zip(self._graph.inputs, self._graph.signature.inputs, strict=True)
        missing = {node: port for node, port in ports if port.role == "past" and node not in batch}
        rows = len(next(iter(batch.values()))) if missing else 0
        return {node: empty_cache(port, rows, self._device) for node, port in missing.items()}


@dataclass(frozen=True)
class SweepContext:
    """What is the same for all segments of a sweep.

    Attributes:
        graph: being rewritten.
        device: where it runs.
        store: holds the values at the frontier.
        batches: probes first, then the calibration inputs.
        probe_count: how many of them are probes: no statistic sees them.
        has_reference: whether there is a reference lane.
        outside: of a batch, what segments read that no segment computes; see `OutsideValues`.
    """

    graph: Graph
    device: torch.device
    store: ValueStore
    batches: Sequence[Batch]
    probe_count: int
    has_reference: bool
    outside: Callable[[Batch], dict[fx.Node, Any]]


@dataclass(frozen=True)
class Frontier:
    """A place that all batches have reached, and the values alive there in both lanes.

    Attributes:
        working: by batch, the values in the model as it is rewritten.
        reference: by batch, the values in the model without approximations; the very same list as long as nothing
            approximate lies behind.
        executed: the nodes of the segment that lie behind; none at a cut.
    """

    working: list[ValueHandle]
    reference: list[ValueHandle]
    executed: frozenset[fx.Node] = field(default=frozenset(), repr=False)

    @classmethod
    def of_inputs(cls, context: SweepContext) -> "Frontier":
        """Where a sweep begins: nothing is alive but the inputs of the graph."""
        values = [context.store.put({}) for _ in context.batches]
        return cls(values, values)

    @property
    def is_forked(self) -> bool:
        """Whether the lanes hold different values."""
        return self.reference is not self.working

    def alive(self) -> set[fx.Node]:
        """The nodes whose values are held."""
        return set(self.working[0].entries) if self.working else set()

    def drop(self, store: ValueStore) -> None:
        """Frees all values."""
        for index in range(len(self.working)):
            self.drop_batch(store, index)

    def drop_batch(self, store: ValueStore, index: int) -> None:
        """Frees the values of one batch."""
        store.drop(self.working[index])
        if self.is_forked:
            store.drop(self.reference[index])


def original_name(site: Site) -> str:
    """Where the float weight of a site stays readable while its segment is worked on."""
    return f"{site.weight}_original"


class Position:
    """Runs the batches through one segment, as far as is asked, and takes them back when need be.

    They can be taken back to one earlier frontier: the inputs at first, and a later one as soon as nothing behind it
    can be rewritten any more.

    Args:
        context: what is the same for all segments.
        segment: the one they are in.
        inputs: where they stand: at the cut ahead of it.

    Attributes:
        keep_start: hold on to the values at the inputs, because a rewrite may make it necessary to start again.
    """

    def __init__(self, context: SweepContext, segment: Segment, inputs: Frontier) -> None:
        self.keep_start = False
        self.segment = segment
        self._context, self._store = context, context.store
        self._rewind_point = self._current = inputs

    def gather(self, taps: Sequence[Tap], later: Sequence[Tap], pending: Sequence[Wave]) -> dict[Tap, Statistic]:
        """Runs the batches up to the taps and returns the statistics gathered there.

        Args:
            taps: what is wanted now.
            later: what the same pass will want in this segment.
            pending: the waves that are yet to be rewritten, this one included.
        """
        gathered = {tap: tap.kind() for tap in dict.fromkeys(taps)}
        alive = self._current.alive()
        if any(tap.value in self._current.executed and tap.value not in alive for tap in gathered):
            self._rewind()

        def take(values: _Values, reference: _Values) -> None:
            for tap, statistic in gathered.items():
                statistic.update(values[tap.value], reference[tap.value] if tap.kind.needs_reference else None)

        may_be_rewritten = {node for wave in pending for site in wave for node in site.nodes}
        self._advance([tap.value for tap in gathered], take, [tap.value for tap in later], may_be_rewritten)
        return gathered

    def probe_outputs(self) -> list[Tensor]:
        """What the segment gives, as it stands now, for the first batch: a probe."""
        context = self._context
        nodes = [node for node in self.segment.nodes() if node not in self._rewind_point.executed]
        stretch = Stretch(nodes, self.segment.outputs)
        loaded = stretch.load(context.graph.weights.read, context.device)
        held = self._store.get(self._rewind_point.working[0])
        values = stretch.run({**context.outside(context.batches[0]), **held}, loaded, context.device)
        return [values[node] for node in self.segment.outputs]

    def rewind_if_executed(self, wave: Wave, *, upstream: bool) -> None:
        """Takes the batches back if something that was rewritten has been executed already.

        Args:
            wave: that was rewritten.
            upstream: whether nodes ahead of its sites were rewritten too.
        """
        if upstream or any(node in self._current.executed for site in wave for node in site.nodes):
            self._rewind()

    def finish(self) -> Frontier:
        """Runs to the end of the segment and returns the frontier at the cut there."""
        self.keep_start = False
        self._advance(self.segment.outputs, None, (), set())
        if self._rewind_point is not self._current:
            self._rewind_point.drop(self._store)
        return replace(self._current, executed=frozenset())

    def abandon(self) -> Frontier:
        """Frees what is held, where nothing further need be computed, and returns a frontier without batches."""
        self._rewind_point.drop(self._store)
        if self._current is not self._rewind_point:
            self._current.drop(self._store)
        return Frontier([], [])

    def _rewind(self) -> None:
        if self._current is not self._rewind_point:
            self._current.drop(self._store)
        self._current = self._rewind_point

    def _advance(
        self,
        targets: Sequence[fx.Node],
        take: _Take | None,
        wanted_later: Sequence[fx.Node],
        may_be_rewritten: set[fx.Node],
    ) -> None:
        """Executes what the targets need, batch by batch, and moves the frontier behind it.

        Args:
            targets: the nodes whose values are wanted.
            take: is given the values of every batch but the probes.
            wanted_later: nodes to hold the values of if they are executed on the way.
            may_be_rewritten: nodes of weights that are still to be rewritten: once one of them has been executed, the
                batches may have to start again.
        """
        leg = _Leg(self._context, self.segment, self._current, targets, wanted_later)
        is_rewind_point = self._current is self._rewind_point
        is_held = is_rewind_point and (self.keep_start or bool(may_be_rewritten & leg.executed))
        working: list[ValueHandle] = []
        reference: list[ValueHandle] = [] if leg.is_forked else working
        for index in range(len(self._context.batches)):
            self._advance_batch(index, leg, take, working, reference, is_dropped=not is_held)
        frontier = Frontier(working, reference, leg.executed)
        if is_rewind_point and not is_held:
            self._rewind_point = frontier
        self._current = frontier

    def _advance_batch(
        self,
        index: int,
        leg: "_Leg",
        take: _Take | None,
        working: list[ValueHandle],
        reference: list[ValueHandle],
        *,
        is_dropped: bool,
    ) -> None:
        """Executes a leg for one batch and puts away the values at its end; those at its beginning may be freed."""
        values, expected = leg.run(index)
        if is_dropped:
            self._current.drop_batch(self._store, index)
        if take is not None and index >= self._context.probe_count:
            take(values, expected)
        working.append(self._store.put({node: values[node] for node in leg.alive}))
        if leg.is_forked:
            reference.append(self._store.put({node: expected[node] for node in leg.alive}))


class _Leg:
    """What is executed from one frontier to the next, with the weights it takes, in both lanes.

    Args:
        context: of the sweep.
        segment: that it lies in.
        start: the frontier that it begins at.
        targets: the nodes whose values are wanted.
        wanted_later: nodes to hold the values of if they are executed on the way, or held already.

    Attributes:
        executed: the nodes of the segment that lie behind its end.
        alive: the nodes whose values are held at its end.
        is_forked: whether the lanes hold different values there.
    """

    def __init__(
        self,
        context: SweepContext,
        segment: Segment,
        start: Frontier,
        targets: Sequence[fx.Node],
        wanted_later: Sequence[fx.Node],
    ) -> None:
        self._context, self._start = context, start
        remaining = [node for node in segment.nodes() if node not in start.executed]
        self.executed = start.executed.union(Stretch(remaining, targets).nodes)
        ahead = Stretch([node for node in remaining if node not in self.executed], segment.outputs)
        wanted = dict.fromkeys([*ahead.inputs, *segment.outputs, *wanted_later])
        held = start.alive()
        self.alive = [node for node in wanted if node in self.executed or node in held]
        self._stretch = Stretch(remaining, [*targets, *self.alive])
        self._routing = _routing(self._stretch.nodes) if context.has_reference else []
        if self._routing:
            self._stretch = Stretch(remaining, [*targets, *self.alive, *self._routing])
        nodes = self._stretch.nodes
        self._weights = self._stretch.load(context.graph.weights.read, context.device)
        self._originals, self._rounding = self._weights, set[fx.Node]()
        if context.has_reference:
            self._originals = _with_originals(context, segment, self._weights)
            self._rounding = activation_rounding(nodes) | cache_rounding(nodes)
        is_approximate = self._originals is not self._weights or bool(self._rounding)
        self.is_forked = context.has_reference and (is_approximate or start.is_forked)

    def run(self, index: int) -> tuple[_Values, _Values]:
        """Executes it for one batch: its values in the working lane, and in the reference lane (the same if one)."""
        context = self._context
        outside = context.outside(context.batches[index])
        held = self._start.working[index], self._start.reference[index]
        values = self._stretch.run({**outside, **context.store.get(held[0])}, self._weights, context.device)
        if not self.is_forked:
            return values, values
        alike = {node: values[node] for node in self._routing}
        given = {**outside, **context.store.get(held[1]), **alike}
        return values, self._stretch.run(given, self._originals, context.device, self._rounding, alike)


def _with_originals(context: SweepContext, segment: Segment, loaded: dict[fx.Node, Any]) -> dict[fx.Node, Any]:
    """Loaded weights, with float ones in the place of those quantized in this segment; the same if there are none."""
    weights, replaced = context.graph.weights, dict[fx.Node, Tensor]()
    for site in segment.sites:
        weight = site.nodes[0].args[1]
        if not isinstance(weight, fx.Node) or weight.op == "get_attr" or weight not in loaded:
            continue  # in float, or not executed here
        if original_name(site) in weights:
            replaced[weight] = weights.read(original_name(site)).to(context.device, torch.float32)
    return {**loaded, **replaced} if replaced else loaded


def _routing(nodes: Sequence[fx.Node]) -> list[fx.Node]:
    """The values that say which expert each row goes to: the reference sends rows the same way, or none would match."""
    take = torch.ops.qcompiler.take_expert.default
    return list(dict.fromkeys(node.args[1] for node in nodes if node.target is take))  # type: ignore[misc]
