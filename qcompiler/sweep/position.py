"""Where the calibration batches stand inside a segment: run on, observed on the way, and taken back when need be."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from qcompiler.ir import Graph, Segment, Site, Stretch, activation_rounding, cache_rounding, empty_cache
from qcompiler.protocol import Statistic, Tap, Wave
from qcompiler.sweep.values import Parked, ValuePark

__all__ = ["Batch", "Outside", "Position", "Run", "original_name"]

Batch = Mapping[fx.Node, Tensor]
"""One value per placeholder of the graph."""


class Outside:
    """Of a batch: the inputs of the graph, and what does not depend on the tokens (masks, positions).

    Args:
        graph: being rewritten.
        prologue: the values that do not depend on the tokens.
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
        """By node, what segments read that no segment computes."""
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
class Run:
    """What is the same for all segments of a sweep.

    Attributes:
        graph: being rewritten.
        device: where it runs.
        park: holds the values between segments.
        batches: one value per placeholder each.
        probes: how many of them, from the first, are for checks alone: no statistic sees them.
        has_reference: whether the model without approximations is run beside.
        outside: of a batch, what segments read that no segment computes.
    """

    graph: Graph
    device: torch.device
    park: ValuePark
    batches: Sequence[Batch]
    probes: int
    has_reference: bool
    outside: Callable[[Batch], dict[fx.Node, Any]]


def original_name(site: Site) -> str:
    """Where the float weight of a site stays readable while its segment is worked on."""
    return f"{site.weight}_original"


class Position:
    """How far the batches have run inside one segment, and where they can be taken back to.

    Args:
        run: what is the same for all segments.
        segment: the one they are in.
        frontier: by batch, the values at its inputs.
        reference: the same in the model without approximations; the same list where there is none.

    Attributes:
        keep_start: hold on to the values at the inputs, because a rewrite may make it necessary to start again.
    """

    def __init__(self, run: Run, segment: Segment, frontier: list[Parked], reference: list[Parked]) -> None:
        self.keep_start = False
        self._all, self.segment, self._park = run, segment, run.park
        self._start = self._values = _Lanes(frontier, reference)
        self._start_run: set[fx.Node] = set()
        self._run: set[fx.Node] = set()

    def gather(self, taps: Sequence[Tap], later: Sequence[Tap], pending: Sequence[Wave]) -> dict[Tap, Statistic]:
        """Runs the batches up to the taps and returns the statistics gathered there.

        Args:
            taps: what is wanted now.
            later: what the same pass will want in this segment.
            pending: the waves that are yet to be rewritten, this one included.
        """
        gathered = {tap: tap.kind() for tap in dict.fromkeys(taps)}
        if any(tap.value in self._run and tap.value not in self._held() for tap in gathered):
            self._rewind()

        def observe(values: Mapping[fx.Node, Any], reference: Mapping[fx.Node, Any]) -> None:
            for tap, statistic in gathered.items():
                statistic.update(values[tap.value], reference[tap.value] if tap.kind.needs_reference else None)

        may_be_rewritten = {node for wave in pending for site in wave for node in site.nodes}
        self._advance([tap.value for tap in gathered], observe, [tap.value for tap in later], may_be_rewritten)
        return gathered

    def probe(self) -> list[Tensor]:
        """What the segment gives, as it stands now, for the first batch."""
        run = self._all
        nodes = [node for node in self.segment.nodes() if node not in self._start_run]
        stretch = Stretch(nodes, self.segment.outputs)
        loaded = stretch.load(run.graph.weights.read, run.device)
        held = self._park.get(self._start.values[0])
        values = stretch.run({**run.outside(run.batches[0]), **held}, loaded, run.device)
        return [values[node] for node in self.segment.outputs]

    def rewind_behind(self, wave: Wave, *, upstream: bool) -> None:
        """Takes the batches back if something rewritten has been run already."""
        if upstream or any(node in self._run for site in wave for node in site.nodes):
            self._rewind()

    def finish(self) -> tuple[list[Parked], list[Parked]]:
        """Runs to the end of the segment and returns what later ones read, and the reference for it."""
        self.keep_start = False
        self._advance(self.segment.outputs, None, (), set())
        if self._start is not self._values:
            self._drop(self._start)
        return self._values.values, self._values.reference

    def abandon(self) -> tuple[list[Parked], list[Parked]]:
        """Frees what is held."""
        self._drop(self._start)
        if self._values is not self._start:
            self._drop(self._values)
        return [], []

    def _advance(
        self,
        targets: Sequence[fx.Node],
        observe: Callable[[Mapping[fx.Node, Any], Mapping[fx.Node, Any]], None] | None,
        wanted_later: Sequence[fx.Node],
        may_be_rewritten: set[fx.Node],
    ) -> None:
        run, held = self._all, self._held()
        remaining = [node for node in self.segment.nodes() if node not in self._run]
        done = self._run.union(Stretch(remaining, targets).nodes)
        ahead = Stretch([node for node in remaining if node not in done], self.segment.outputs)
        wanted = dict.fromkeys([*ahead.inputs, *self.segment.outputs, *wanted_later])
        kept = [node for node in wanted if node in done or node in held]
        stretch = Stretch(remaining, [*targets, *kept])
        routing = _routing(stretch.nodes) if run.has_reference else []
        if routing:
            stretch = Stretch(remaining, [*targets, *kept, *routing])
        loaded = stretch.load(run.graph.weights.read, run.device)
        originals = self._originals(loaded) if run.has_reference else loaded
        leaves_start = self._values is self._start and (self.keep_start or bool(may_be_rewritten & done))
        rounding = activation_rounding(stretch.nodes) | cache_rounding(stretch.nodes) if run.has_reference else set()
        is_forked = run.has_reference and (originals is not loaded or bool(rounding) or self._values.is_forked)
        advanced: list[Parked] = []
        reference: list[Parked] = [] if is_forked else advanced
        for index, (batch, parked, parked_reference) in enumerate(zip(run.batches, *self._values.both, strict=True)):
            outside = run.outside(batch)
            values = stretch.run({**outside, **self._park.get(parked)}, loaded, run.device)
            expected = values
            if is_forked:
                before = {**outside, **self._park.get(parked_reference)}
                alike = {node: values[node] for node in routing}
                expected = stretch.run({**before, **alike}, originals, run.device, rounding, alike)
            if not leaves_start:
                self._values.drop_one(self._park, parked, parked_reference)
            if observe is not None and index >= run.probes:
                observe(values, expected)
            advanced.append(self._park.put({node: values[node] for node in kept}))
            if is_forked:
                reference.append(self._park.put({node: expected[node] for node in kept}))
        ahead_now = _Lanes(advanced, reference)
        if self._values is self._start and not leaves_start:
            self._start, self._start_run = ahead_now, done
        self._values, self._run = ahead_now, done

    def _originals(self, loaded: dict[fx.Node, Any]) -> dict[fx.Node, Any]:
        """What the stretch computes with, float weights in the place of those quantized in this segment."""
        store = self._all.graph.weights
        replaced = {}
        for site in self.segment.sites:
            weight = site.nodes[0].args[1]
            if (
                isinstance(weight, fx.Node)
                and weight.op != "get_attr"
                and weight in loaded
                and original_name(site) in store
            ):
                replaced[weight] = store.read(original_name(site)).to(self._all.device, torch.float32)
        return {**loaded, **replaced} if replaced else loaded

    def _rewind(self) -> None:
        if self._values is not self._start:
            self._drop(self._values)
        self._values, self._run = self._start, self._start_run

    def _held(self) -> set[fx.Node]:
        return set(self._values.values[0].entries) if self._values.values else set()

    def _drop(self, lanes: "_Lanes") -> None:
        for parked, reference in zip(*lanes.both, strict=True):
            lanes.drop_one(self._park, parked, reference)


def _routing(nodes: Sequence[fx.Node]) -> list[fx.Node]:
    """The values that say which expert each row goes to: the reference sends rows the same way, or none would match."""
    take = torch.ops.qcompiler.take_expert.default
    return list(dict.fromkeys(node.args[1] for node in nodes if node.target is take))  # type: ignore[misc]


@dataclass(frozen=True)
class _Lanes:
    """Values of all batches at one place: as the rewritten model has them, and as the reference has them.

    Both are the same list as long as nothing approximate lies behind them.
    """

    values: list[Parked]
    reference: list[Parked]

    @property
    def is_forked(self) -> bool:
        return self.reference is not self.values

    @property
    def both(self) -> tuple[list[Parked], list[Parked]]:
        return self.values, self.reference

    def drop_one(self, park: ValuePark, parked: Parked, reference: Parked) -> None:
        park.drop(parked)
        if reference is not parked:
            park.drop(reference)
