"""Runs a whole graph with the weights of one segment in memory at a time.

Nothing is rewritten on the way. Many batches go through each segment while its weights are there, so that a model is
read once for all of them.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from qcompiler.ir.execute import Stretch
from qcompiler.ir.graph import Graph, is_op
from qcompiler.ir.memory import Trimmer
from qcompiler.ir.segments import segment_graph
from qcompiler.ir.walks import ancestors

__all__ = ["Around", "results_of", "run_by_segments"]

Batch = Mapping[fx.Node, Any]
Around = Callable[[int], AbstractContextManager[object]]
"""Entered whenever something of a batch is computed, with the number of the batch."""
_MOST_TO_LOAD = 4
"""Times the memory of weights that dequantizing them takes, with what it makes on the way."""


def results_of(graph: Graph) -> list[fx.Node]:
    """The nodes a graph returns, caches apart."""
    return [node for node, port in zip(graph.outputs, graph.signature.outputs, strict=True) if port.role != "present"]


def run_by_segments(
    graph: Graph,
    runs: Sequence[Sequence[Batch]],
    device: torch.device,
    wanted: Sequence[fx.Node],
    *,
    passed_through: Collection[fx.Node] = (),
    around: Around = lambda _: nullcontext(),
) -> Iterator[list[Any]]:
    """The values of some nodes, for one batch after another.

    Batches of a run follow one another in the cache. Of all but the first, what the caches hold is not read, only its
    shape: it is what the batch ahead returned. Those values are there while their segment is, so the caches of one
    segment are in memory at a time, as its weights are.

    Args:
        graph: as it stands now.
        runs: each of one or several batches, which have a value for every placeholder.
        device: where it runs.
        wanted: nodes of the graph.
        passed_through: nodes that give their first argument instead of being called.
        around: entered whenever something of a batch is computed, with its number, counted through all runs.

    Yields:
        The values of ``wanted`` for each batch, run by run. The last segment computes them as they are asked for.
    """
    plan = _Plan.of(graph, wanted, is_chained=any(len(run) > 1 for run in runs))
    memory = Trimmer()
    numbers, count = [], 0
    for run in runs:
        numbers.append(range(count, count + len(run)))
        count += len(run)
    given: list[dict[fx.Node, Any]] = []
    loaded = plan.prologue.load(graph.weights.read, device)
    for number, batch in enumerate(batch for run in runs for batch in run):
        with around(number):
            given.append({**batch, **plan.prologue.run(batch, loaded, device, passed_through)})
    carried: list[dict[fx.Node, Any]] = [{} for _ in given]
    for span in plan.spans:
        loaded = span.stretch.load(graph.weights.read, device)
        for run_numbers in numbers:
            ahead: dict[fx.Node, Any] = {}
            for number in run_numbers:
                cached = {past: ahead[present] for past, present in span.chained.items()} if ahead else {}
                with around(number):
                    values = {**given[number], **carried[number], **cached}
                    ahead = {**carried[number], **span.stretch.run(values, loaded, device, passed_through)}
                del values, cached
                carried[number] = {node: value for node, value in ahead.items() if node in span.alive}
                if span is plan.spans[-1]:
                    yield [ahead[node] if node in ahead else given[number][node] for node in wanted]
        size = sum(value.nbytes for value in loaded.values() if isinstance(value, torch.Tensor))
        del loaded, ahead
        memory.trim(reused=_MOST_TO_LOAD * size)


@dataclass(frozen=True)
class _Span:
    """What runs while its weights are loaded.

    Attributes:
        stretch: the nodes.
        chained: of the caches it reads, the nodes of the batch ahead that stand in for them.
        alive: values that are read or wanted behind it.
    """

    stretch: Stretch
    chained: Mapping[fx.Node, fx.Node]
    alive: frozenset[fx.Node]


@dataclass(frozen=True)
class _Plan:
    """What is computed once for each batch, and the spans that follow."""

    prologue: Stretch
    spans: tuple[_Span, ...]

    @classmethod
    def of(cls, graph: Graph, wanted: Sequence[fx.Node], *, is_chained: bool) -> "_Plan":
        """Finds them; every node that something wanted depends on is in one of them."""
        cut = segment_graph(graph)
        chains = _chains(graph) if is_chained else {}
        reads = _reads_of_caches(graph, cut.prologue)
        moved = {node for node in cut.prologue if node in reads}
        anywhere = moved | _constants(graph)
        needed = ancestors([*wanted, *chains.values()])
        homes: dict[fx.Node, int] = {}
        ends = [segment.last for segment in cut.segments[:-1]]
        place = 0
        for node in graph.fx.nodes:
            if node.op == "call_function" and node in needed and node not in anywhere and node not in cut.prologue:
                homes[node] = place
            if place < len(ends) and node is ends[place]:
                place += 1
        homes = _joined(homes, chains, reads)
        last_reads: dict[fx.Node, int] = {}
        for node, home in homes.items():
            standing_in = [chains[past] for past in reads.get(node, ()) if past in chains]
            for source in (*node.all_input_nodes, *standing_in):
                last_reads[source] = home  # homes ascend
        count = max(homes.values(), default=0) + 1
        last_reads |= dict.fromkeys(wanted, count)
        spans = []
        for place in range(count):
            inside = [node for node, home in homes.items() if home == place]
            pasts = {past for node in inside for past in reads.get(node, ())}
            chained = {past: present for past, present in chains.items() if past in pasts}
            alive = [node for node, home in homes.items() if home <= place < last_reads.get(node, -1)]
            members = {*inside, *anywhere}
            kept = [node for node in alive if homes[node] == place]
            stretch = Stretch([node for node in graph.fx.nodes if node in members], [*kept, *chained.values()])
            spans.append(_Span(stretch, chained, frozenset(alive)))
        return cls(Stretch(graph.fx.nodes, [n for n in cut.prologue if n not in moved]), tuple(spans))


def _chains(graph: Graph) -> dict[fx.Node, fx.Node]:
    """The node that a batch returns for each cache that the next one takes."""
    taken = [node for node, port in zip(graph.inputs, graph.signature.inputs, strict=True) if port.role == "past"]
    given = [node for node, port in zip(graph.outputs, graph.signature.outputs, strict=True) if port.role == "present"]
    return dict(zip(taken, given, strict=True))


def _reads_of_caches(graph: Graph, prologue: Collection[fx.Node]) -> dict[fx.Node, frozenset[fx.Node]]:
    """By node, the caches whose values it reads: directly, or by way of nodes ahead of the tokens."""
    inputs = zip(graph.inputs, graph.signature.inputs, strict=True)
    through = {node: frozenset([node]) for node, port in inputs if port.role == "past"}
    ahead = set(prologue)
    found: dict[fx.Node, frozenset[fx.Node]] = {}
    for node in graph.fx.nodes:
        if node.op != "call_function" or is_op(node, torch.ops.aten.sym_size.int):
            continue
        caches = frozenset(past for source in node.all_input_nodes for past in through.get(source, ()))
        if caches:
            found[node] = caches
            if node in ahead:
                through[node] = caches
    return found


def _constants(graph: Graph) -> set[fx.Node]:
    """The calls that depend on stored tensors alone."""
    constant = {node for node in graph.fx.nodes if node.op == "get_attr"}
    for node in graph.fx.nodes:
        if node.op == "call_function" and node.all_input_nodes and constant.issuperset(node.all_input_nodes):
            constant.add(node)
    return {node for node in constant if node.op == "call_function"}


def _joined(
    homes: Mapping[fx.Node, int], chains: Mapping[fx.Node, fx.Node], reads: Mapping[fx.Node, frozenset[fx.Node]]
) -> dict[fx.Node, int]:
    """Spans become one where an earlier one reads a cache that a later one makes."""
    ends: dict[int, int] = {}
    for node, home in homes.items():
        for past in reads.get(node, ()):
            made = homes.get(chains[past], home) if past in chains else home
            ends[home] = max(ends.get(home, home), made)
    numbers: dict[int, int] = {}
    number, end = -1, -1
    for home in range(max(homes.values(), default=-1) + 1):
        number += home > end
        end = max(end, ends.get(home, home))
        numbers[home] = number
    return {node: numbers[home] for node, home in homes.items()}
