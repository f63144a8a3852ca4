"""Runs a whole graph on a small input, one segment's weights in memory at a time.

Nothing is rewritten on the way: so exact passes on the whole graph are probed, and the held-out tokens measured.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from qcompiler.ir import Graph, Stretch, segment_graph

__all__ = ["run_by_segments"]


def run_by_segments(graph: Graph, batch: Mapping[fx.Node, Tensor], device: torch.device) -> list[Tensor]:
    """What a graph returns, caches apart.

    Args:
        graph: as it stands now.
        batch: a value per placeholder.
        device: where it runs.

    Returns:
        One tensor per output that is no cache, in order.
    """
    cut = segment_graph(graph)
    prologue = Stretch(list(graph.fx.nodes), cut.prologue)
    values: dict[fx.Node, Any] = {**batch}
    values.update(prologue.run(values, prologue.load(graph.weights.read, device), device))
    wanted = [node for node, port in zip(graph.outputs, graph.signature.outputs, strict=True) if port.role != "present"]
    outside = set(values)
    for segment in cut.segments:
        stretch = Stretch(segment.nodes(), segment.outputs)
        results = stretch.run(values, stretch.load(graph.weights.read, device), device)
        values = {node: value for node, value in values.items() if node in outside} | results
    return [values[node] for node in wanted]
