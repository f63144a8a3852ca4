"""Cuts a graph where few values are alive, so that one piece after another can be calibrated and rewritten."""

from dataclasses import dataclass

import torch
from torch import fx

from qcompiler.graph import Graph, Site, ancestors

__all__ = ["Segment", "SegmentedGraph", "segment_graph"]

_aten = torch.ops.aten


@dataclass(frozen=True)
class Segment:
    """A piece of the graph between two cuts.

    Attributes:
        index: its place.
        first, last: its first and last node (nodes inserted later between them belong to it).
        outputs: the values later segments read; the graph's result for the last one.
        sites: the linear layers inside, in execution order.
    """

    index: int
    first: fx.Node
    last: fx.Node
    outputs: tuple[fx.Node, ...]
    sites: tuple[Site, ...]

    def nodes(self) -> list[fx.Node]:
        """The nodes from `first` to `last`, as the graph stands now."""
        found = [self.first]
        while found[-1] is not self.last:
            found.append(found[-1].next)
        return found

    def waves(self) -> list[tuple[Site, ...]]:
        """Sites grouped by how many others of the segment stand before them: q, k, v → o; gate, up → down."""
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
        return [
            tuple(site for site in self.sites if level[site.name] == depth_now)
            for depth_now in sorted(set(level.values()))
        ]


@dataclass(frozen=True)
class SegmentedGraph:
    """A graph and its cuts.

    Attributes:
        prologue: nodes whose values do not depend on the tokens themselves (masks, rotary tables); they are the same for
            every batch of one shape and are alive throughout.
        segments: the pieces, in order.
    """

    prologue: tuple[fx.Node, ...]
    segments: tuple[Segment, ...]


def segment_graph(graph: Graph) -> SegmentedGraph:
    """Finds the cuts by liveness alone.

    A cut lies behind a node where as few computed values are alive as anywhere between the first and the last linear layer: in
    a residual network the residual stream alone. A stretch without a linear layer joins the one behind it, except one that
    reads an embedding table, whose weights need not be in memory together with a layer's.
    """
    result = graph.outputs[graph.signature.index_of_output("logits") or 0]
    wanted = ancestors([result])
    ids = [node for node, port in zip(graph.inputs, graph.signature.inputs, strict=True) if port.role in ("ids", "other")]
    dependent = set(ids)
    prologue, main = [], []
    for node in graph.fx.nodes:
        if node.op != "call_function" or node not in wanted:
            continue
        reads_values = dependent.intersection(node.all_input_nodes) and node.target is not _aten.sym_size.int
        if reads_values:
            dependent.add(node)
            main.append(node)
        elif not (node.all_input_nodes and all(source.op == "get_attr" for source in node.all_input_nodes)):
            prologue.append(node)
    last_use = {source: i for i, node in enumerate(main) for source in node.all_input_nodes}
    alive: set[fx.Node] = set()
    live_after: list[tuple[fx.Node, ...]] = []
    for index, node in enumerate(main):
        alive.add(node)
        alive = {value for value in alive if last_use.get(value, -1) > index or value is result}
        live_after.append(tuple(value for value in main[: index + 1] if value in alive))
    sites = graph.sites()
    site_positions = sorted(main.index(node) for site in sites for node in site.nodes if node in dependent)
    cuts = _cuts(main, [len(values) for values in live_after], site_positions)
    segments = []
    start = 0
    for index, cut in enumerate(cuts):
        inside = set(main[start : cut + 1])
        segments.append(
            Segment(
                index,
                main[start],
                main[cut],
                live_after[cut] if cut < len(main) - 1 else (result,),
                tuple(site for site in sites if inside.issuperset(site.nodes)),
            )
        )
        start = cut + 1
    return SegmentedGraph(tuple(prologue), tuple(segments))


def _cuts(main: list[fx.Node], alive: list[int], site_positions: list[int]) -> list[int]:
    """Indices of the last node of each segment."""
    end = len(main) - 1
    if len(site_positions) < 2:
        return [end]
    between = range(site_positions[0], site_positions[-1])
    fewest = min(alive[i] for i in between)
    candidates = [i for i in range(end) if alive[i] <= fewest and i < site_positions[-1]]
    cuts: list[int] = []
    start = 0
    for cut in candidates:
        inside = range(start, cut + 1)
        has_site = any(position in inside for position in site_positions)
        has_table = any(main[i].target is _aten.embedding.default for i in inside)
        if has_site or has_table:
            cuts.append(cut)
            start = cut + 1
    return [*cuts, end]
