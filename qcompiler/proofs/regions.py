"""Finds regions: where a diagonal scale on channels may move from one weight to another without changing the function.

A region is proved by following *labels*. Every output channel of a producer (a norm's weight, the rows of a linear
layer) is given a number; the numbers travel through the graph as small integer tensors of the value's own shape, with
size 1 along the axes that vary. Reshapes, transposes, slices and grouped heads act on them as they act on the data. An
operator that commutes with a positive scale passes labels on, a linear layer absorbs them in its columns, anything else
*pins* the channels it reads: their scale must stay 1. Where two labelled values are added, their channels must share
one scale. What is left, neither pinned nor unread, is free.

The walk proves the same for every family without knowing one: norm → q, k, v; norm → gate, up; v → o through attention
(with grouped heads the scale agrees over the query heads that share a key head, since they carry the same label);
up → down through the gate; and of fused projections just the rows for which it holds.
"""

from collections.abc import Iterable

from torch import fx

from qcompiler.ir import Graph
from qcompiler.proofs.channel_walk import ChannelWalk, may_produce
from qcompiler.proofs.region import Region, Regions

__all__ = ["find_regions"]


def find_regions(graph: Graph, nodes: Iterable[fx.Node] | None = None) -> Regions:
    """Every region of a graph, or of a piece of it.

    Args:
        graph: in canonical form.
        nodes: producers and consumers must be among these; all by default. What lies behind them counts as a reader
            that pins.
    """
    walk = ChannelWalk(graph, None if nodes is None else set(nodes))
    found, refused, taken = [], [], set[fx.Node]()
    for node in graph.fx.nodes:
        if (walk.inside is not None and node not in walk.inside) or node in taken or not may_produce(node):
            continue
        result = walk.prove(node)
        if isinstance(result, Region):
            taken.update(producer.node for producer in result.producers)
            found.append(result)
        else:
            refused.append(result)
    return Regions(tuple(found), tuple(refused))
