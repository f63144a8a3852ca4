"""Embedding tables of codes, as the operator that dequantizes the rows it chooses."""

from typing import Any

from torch import fx

from qcompiler.ir import Graph, quantized_tables
from qcompiler.lowering.ort.fusing.operators import gather_block_quantized
from qcompiler.lowering.ort.support import block_of, stored_bits

__all__ = ["fuse_tables"]


def fuse_tables(graph: Graph) -> None:
    """Replaces what gives the rows of tables, in place."""
    for table in quantized_tables(graph):
        spec = table.spec
        assert spec is not None
        bits, block = stored_bits(spec.dtype), block_of(spec.group_size, table.columns)
        if spec.is_float or bits is None or block is None:
            continue
        for node in table.nodes:
            codes, scale, zero = node.args[:3]
            assert isinstance(codes, fx.Node)
            with graph.fx.inserting_before(node):
                stored = [
                    graph.stored_node(str(part.args[0].target)) if isinstance(part, fx.Node) else None  # type: ignore[union-attr]
                    for part in (codes, scale, zero)
                ]
                options: dict[str, Any] = {"block": block, "bits": bits, "group": spec.group_of(table.columns)}
                made = graph.fx.call_function(gather_block_quantized, (codes.args[1], *stored), options)
            made.meta.update({key: node.meta[key] for key in ("dtype", "shape")})
            node.replace_all_uses_with(made)
            graph.fx.erase_node(node)
