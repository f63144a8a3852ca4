"""Cuts a graph where few values are alive, so that one piece after another can be calibrated and rewritten."""

from dataclasses import dataclass

import torch
from torch import fx

from qcompiler.ir.graph import Graph, Site, is_op
from qcompiler.ir.walks import ancestors

__all__ = ["Segment", "SegmentedGraph", "segment_graph"]

_aten = torch.ops.aten
_canonical = torch.ops.qcompiler
_LARGEST_MOMENTS = 1 << 28
"""Elements of the second moments that are gathered together: 1 GB in float32."""


@dataclass(frozen=True)
class Segment:
    """A piece of the graph between two cuts.

    Attributes:
        index: its place.
        previous, last: the node before its first, and its last; what is inserted between them later belongs to it.
        outputs: the values that later segments read or the graph returns (caches apart).
        sites: the linear layers inside, in execution order.
        prologue: see `SegmentedGraph`.
    """

    index: int
    previous: fx.Node
    last: fx.Node
    outputs: tuple[fx.Node, ...]
    sites: tuple[Site, ...]
    prologue: frozenset[fx.Node]

    def nodes(self) -> list[fx.Node]:
        """The nodes behind `previous` up to `last`, as the graph stands now, without the prologue's."""
        found = []
        node = self.previous
        while node is not self.last:
            node = node.next
            if node not in self.prologue:
                found.append(node)
        return found

    def waves(self) -> list[tuple[Site, ...]]:
        """Sites grouped by how many others of the segment stand before them: q, k, v → o; gate, up → down.

        Groups with many inputs, such as the experts of a mixture, come in several parts, so that second moments of all
        their inputs need not be in memory together.
        """
        depth: dict[fx.Node, int] = {}
        site_of = {node: site for site in self.sites for node in site.nodes}
        level: dict[str, int] = {}
        for node in self.nodes():
            before = max((depth.get(source, 0) for source in node.all_input_nodes), default=0)
            if node in site_of:
                name = site_of[node].name
                level[name] = max(level.get(name, 0), before)
                before += 1
            depth[node] = before
        waves = ([s for s in self.sites if level[s.name] == depth_now] for depth_now in sorted(set(level.values())))
        return [part for wave in waves for part in _parts(wave)]


def _parts(sites: list[Site]) -> list[tuple[Site, ...]]:
    """Sites whose inputs are independent, in runs whose second moments have a bounded size together.

    Sites that read one value stay together.
    """
    together: dict[tuple[fx.Node, ...], list[Site]] = {}
    for site in sites:
        together.setdefault(site.inputs, []).append(site)
    parts: list[list[Site]] = [[]]
    size = 0
    for inputs, group in together.items():
        elements = len(inputs) * group[0].in_features ** 2
        if parts[-1] and size + elements > _LARGEST_MOMENTS:
            parts.append([])
            size = 0
        parts[-1] += group
        size += elements
    return [tuple(part) for part in parts]


@dataclass(frozen=True)
class SegmentedGraph:
    """A graph and its cuts.

    Attributes:
        prologue: nodes whose values do not depend on the tokens themselves (masks, rotary tables); they are the same
            for every batch of one shape and are alive throughout.
        segments: the pieces, in order.
    """

    prologue: tuple[fx.Node, ...]
    segments: tuple[Segment, ...]


def segment_graph(graph: Graph) -> SegmentedGraph:
    """Finds the cuts by liveness alone.

    A cut lies behind a node where as few computed values are alive as anywhere between the first and the last linear
    layer: in a residual network the residual stream alone. A stretch without a linear layer joins the one behind it,
    except one that reads an embedding table, whose weights need not be in memory together with a layer's. No cut lies
    between two uses of one linear layer: it is rewritten once.

    Every linear layer that the results depend on is in exactly one segment. Products with a matrix that is computed,
    as one with noise is, count as linear layers for where cuts lie.
    """
    results = [
        node for node, port in zip(graph.outputs, graph.signature.outputs, strict=True) if port.role != "present"
    ]
    prologue, main = _split(graph, ancestors(results))
    position = {node: index for index, node in enumerate(main)}
    alive = [len(values) for values in _alive_after(main, [])]
    kept = _alive_after(main, results)
    sites = [site for site in graph.sites() if any(node in position for node in site.nodes)]
    spans = [sorted(position[node] for node in site.nodes if node in position) for site in sites]
    of_sites = {node for site in sites for node in site.nodes}
    others = [[i] for i, node in enumerate(main) if is_op(node, _canonical.linear.default) and node not in of_sites]
    segments: list[Segment] = []
    start, previous, outside = 0, graph.inputs[-1], frozenset(prologue)
    for end in _cuts(main, alive, [*spans, *others]):
        inside = tuple(s for s, span in zip(sites, spans, strict=True) if start <= span[0] <= end)
        segments.append(Segment(len(segments), previous, main[end], kept[end], inside, outside))
        start, previous = end + 1, main[end]
    return SegmentedGraph(tuple(prologue), tuple(segments))


def _split(graph: Graph, wanted: set[fx.Node]) -> tuple[list[fx.Node], list[fx.Node]]:
    """The calls before and after the tokens come in. A linear layer counts as after, whatever it reads."""
    dependent = {
        node for node, port in zip(graph.inputs, graph.signature.inputs, strict=True) if port.role in ("ids", "other")
    }
    prologue, main = [], []
    for node in graph.fx.nodes:
        if node.op != "call_function" or node not in wanted:
            continue
        sources = node.all_input_nodes
        reads_values = bool(dependent.intersection(sources)) and not is_op(node, _aten.sym_size.int)
        if reads_values or is_op(node, _canonical.linear.default):
            dependent.add(node)
            main.append(node)
        elif not sources or any(source.op != "get_attr" for source in sources):
            prologue.append(node)
    return prologue, main


def _alive_after(main: list[fx.Node], results: list[fx.Node]) -> list[tuple[fx.Node, ...]]:
    """For each node, the values computed up to it that are read behind it or returned."""
    last_use = {source: index for index, node in enumerate(main) for source in node.all_input_nodes}
    last_use.update(dict.fromkeys(results, len(main)))
    alive: dict[fx.Node, None] = {}
    found = []
    for index, node in enumerate(main):
        alive[node] = None
        alive = {value: None for value in alive if last_use.get(value, -1) > index}
        found.append(tuple(alive))
    return found


def _cuts(main: list[fx.Node], alive: list[int], spans: list[list[int]]) -> list[int]:
    """Indices of the last node of each segment.

    Args:
        main: the nodes.
        alive: how many values are alive behind each.
        spans: for each linear layer, the indices of its uses, ascending.
    """
    if not main:
        return []
    end = len(main) - 1
    uses = sorted(index for span in spans for index in span)
    if len(uses) < 2:
        return [end]
    fewest = min(alive[uses[0] : uses[-1]])
    within = {index for span in spans for index in range(span[0], span[-1])}
    cuts: list[int] = []
    start = 0
    for index in range(uses[-1]):
        if alive[index] > fewest or index in within:
            continue
        stretch = range(start, index + 1)
        if any(use in stretch for use in uses) or any(is_op(main[i], _aten.embedding.default) for i in stretch):
            cuts.append(index)
            start = index + 1
    return [*cuts, end]
