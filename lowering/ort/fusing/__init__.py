"""Rewrites a copy of a graph to operators of ONNX Runtime's own, each a node whose target `operators` names."""

from qcompiler.ir import Graph
from qcompiler.lowering.ort.fusing.attention import fuse_attention
from qcompiler.lowering.ort.fusing.norms import fuse_norms
from qcompiler.lowering.ort.fusing.products import fuse_products
from qcompiler.lowering.ort.fusing.tables import fuse_tables
from qcompiler.lowering.ort.fusing.unused import drop_unused_inputs

__all__ = ["fuse"]


def fuse(graph: Graph, length: int | None) -> Graph:
    """A copy of a graph with everything fused that has an operator.

    Args:
        graph: is not changed.
        length: positions that tables of rotary embeddings reach; None: there are none.
    """
    copy = graph.copy()
    fuse_products(copy)
    fuse_attention(copy, length)
    fuse_norms(copy)
    fuse_tables(copy)
    copy.fx.eliminate_dead_code()
    drop_unused_inputs(copy)
    return copy
