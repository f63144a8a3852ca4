"""How far a model may be from its graph because it rounds activations to a dtype: the graph itself, with such noise.

Behind every node whose value a lowered model rounds stands an error as large as that rounding: evenly distributed
within half a step, ``eps / 2`` of the value. A product of matrices has weights rounded too, one error for each of its
terms: relative to the root mean square of its results, whatever cancels in one of them. Sums in float32 may be taken in
another order: ``sqrt(terms)`` steps of that. What these errors make of the logits, the network decides, so they are not
estimated but computed: the difference between the graph and the graph with noise is one sample of what the difference
between the graph and a lowered model is another sample of. Twice the largest such difference is allowed.
"""

import math
from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from qcompiler.graph import Graph, is_op

__all__ = ["with_noise"]

_canonical = torch.ops.qcompiler
_PRODUCTS = (_canonical.linear.default, _canonical.attention.default)


def with_noise(graph: Graph, rounded: Collection[str], dtype: torch.dtype) -> Graph:
    """A copy of a graph, weights shared, with an error behind every node that is rounded; the same errors every time.

    Args:
        graph: not changed.
        rounded: names of nodes.
        dtype: that they are rounded to.
    """
    nodes: dict[fx.Node, fx.Node] = {}
    copy = fx.Graph()
    results = copy.graph_copy(graph.fx, nodes)
    copy.output(results)
    for source, node in nodes.items():
        node.meta = dict(source.meta)
    terms = max((site.in_features for site in graph.sites()), default=1)
    in_sums = torch.finfo(torch.float32).eps / 2 * math.sqrt(terms)
    in_values = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
    for seed, (source, node) in enumerate(nodes.items()):
        if source.name not in rounded:
            continue
        with copy.inserting_after(node):
            of_rows = in_values + in_sums if is_op(node, *_PRODUCTS) else 0.0
            noisy = copy.call_function(_add_noise, (node, in_values, of_rows, seed))
        for user in [user for user in node.users if user is not noisy]:
            user.replace_input_with(node, noisy)
        noisy.meta = dict(source.meta)
    return replace(graph, fx=copy)


def _add_noise(x: Any, of_values: float, of_rows: float, seed: int) -> Any:
    """``x`` and an error within ``of_values`` of each value, and within ``of_rows`` of the size of its row.

    Codes, and results that are several tensors, are given back as they are.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.dtype.itemsize == 1:
        return x
    generator = torch.Generator(x.device).manual_seed(seed)
    error = torch.rand(x.shape, generator=generator, device=x.device) * 2 - 1
    size = (of_values * x).square()
    if of_rows:
        size = size + of_rows**2 * x.square().mean(-1, keepdim=True)
    return x + error * size.sqrt()
