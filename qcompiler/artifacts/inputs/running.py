"""What a graph computes of its own inputs, one segment of its weights in memory at a time."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from qcompiler.ir import Graph, activation_rounding, feed_tensors, run_by_segments

__all__ = ["outputs_of"]


def outputs_of(
    graph: Graph, batches: Iterable[Sequence[Tensor]], device: str | torch.device = "cpu", *, rounded: bool = True
) -> list[list[Tensor]]:
    """All outputs for each batch, on the CPU.

    Args:
        graph: any.
        batches: one tensor per port.
        device: where it runs.
        rounded: False leaves in float what the graph quantizes of activations.
    """
    place = torch.device(device)
    runs = [[feed_tensors(graph, [_computed_with(tensor).to(place) for tensor in batch])] for batch in batches]
    passed = set() if rounded else activation_rounding(graph.fx.nodes)
    outputs = list(dict.fromkeys(graph.outputs))
    found = run_by_segments(graph, runs, place, outputs, passed_through=passed)
    at = [outputs.index(node) for node in graph.outputs]
    return [[values[index].cpu() for index in at] for values in found]


def _computed_with(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor
