"""A sum and the norm that reads it, as one operator that gives both."""

import operator

import torch
from torch import fx

from qcompiler.ir import Graph, is_op
from qcompiler.lowering.ort.fusing.operators import skip_layer_norm, skip_rms_norm

__all__ = ["fuse_norms"]

_canonical = torch.ops.qcompiler
_add = torch.ops.aten.add.Tensor


def fuse_norms(graph: Graph) -> None:
    """Joins norms and the sums ahead of them, in place; of several norms of one sum, the first."""
    done: set[fx.Node] = set()
    for node in list(graph.fx.nodes):
        if not is_op(node, _canonical.rms_norm.default, _canonical.layer_norm.default):
            continue
        total = node.args[0]
        if isinstance(total, fx.Node) and total not in done and _is_sum(total) and _has_weights(node):
            done.add(total)
            _join(graph, total, node)


def _is_sum(node: fx.Node) -> bool:
    """Of two float tensors of one shape, ``[B, S, H]``."""
    if not is_op(node, _add) or node.kwargs or len(node.args) != 2:
        return False
    sides = [side for side in node.args if isinstance(side, fx.Node) and side.op != "get_attr"]
    shapes = {side.meta.get("shape") for side in sides}
    return len(sides) == 2 and shapes == {node.meta.get("shape")} and len(node.meta.get("shape", ())) == 3


def _has_weights(node: fx.Node) -> bool:
    """Whether weight, and bias where there is one, are stored vectors."""
    weight, *rest = node.args[1:-1]
    return _is_vector(weight) and all(bias is None or _is_vector(bias) for bias in rest)


def _is_vector(node: object) -> bool:
    return isinstance(node, fx.Node) and node.op == "get_attr" and len(node.meta.get("shape", ())) == 1


def _join(graph: Graph, total: fx.Node, norm: fx.Node) -> None:
    kind = skip_rms_norm if is_op(norm, _canonical.rms_norm.default) else skip_layer_norm
    meta = {key: total.meta[key] for key in ("dtype", "shape")}
    with graph.fx.inserting_before(total):
        stored = [
            graph.stored_node(str(part.target)) if isinstance(part, fx.Node) else None for part in norm.args[1:-1]
        ]
        both = graph.fx.call_function(kind, (*total.args, *stored), {"eps": norm.args[-1]})
        normed, added = (graph.fx.call_function(operator.getitem, (both, place)) for place in (0, 1))
    for node, result in ((norm, normed), (total, added)):
        result.meta.update(meta)
        node.replace_all_uses_with(result)
        graph.fx.erase_node(node)
