"""Inputs that nothing reads any more."""

from qcompiler.ir import Graph, Signature

__all__ = ["drop_unused_inputs"]


def drop_unused_inputs(graph: Graph) -> None:
    """Takes positions out where tables of rotary embeddings are read by the place of a token, in place."""
    kept = []
    for node, port in zip(graph.inputs, graph.signature.inputs, strict=True):
        if port.role == "positions" and not node.users:
            graph.fx.erase_node(node)
        else:
            kept.append(port)
    graph.signature = Signature(tuple(kept), graph.signature.outputs)
