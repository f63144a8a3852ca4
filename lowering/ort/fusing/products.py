"""Linear layers whose weights alone are quantized; those that read one value, in one form, side by side."""

import operator
from typing import Any

import torch
from torch import fx

from qcompiler.ir import Graph, is_op, quantized_value
from qcompiler.lowering.onnx.builders.canonical import is_linear_weight, site_of
from qcompiler.lowering.onnx.emitter import argument
from qcompiler.lowering.ort.fusing.operators import matmul_nbits
from qcompiler.lowering.ort.support import block_of, stored_bits

__all__ = ["fuse_products"]

_linear = torch.ops.qcompiler.linear.default


def fuse_products(graph: Graph) -> None:
    """Makes one product of all layers that read a value and whose weights have one form, in place."""
    groups: dict[tuple[object, ...], list[fx.Node]] = {}
    for node in graph.fx.nodes:
        if is_op(node, _linear) and (form := _form(graph, node)) is not None:
            groups.setdefault((node.args[0], *form), []).append(node)
    for (_, bits, block, _), nodes in groups.items():
        _join(graph, nodes, bits, block)


def _form(graph: Graph, node: fx.Node) -> tuple[int, int, bool] | None:
    """Bits, block, and whether there are zero points; None where the weight has no such form."""
    x, weight = node.args[:2]
    if not isinstance(weight, fx.Node) or not is_linear_weight(weight) or quantized_value(x) is not None:
        return None
    codes, _, zero, _, block = weight.args[:5]
    assert isinstance(codes, fx.Node)
    assert isinstance(block, int)
    info = graph.weights.info(str(codes.target))
    bits, size = stored_bits(info.dtype), block_of(block or None, info.shape[1])
    return None if bits is None or size is None else (bits, size, zero is not None or info.dtype.startswith("u"))


def _join(graph: Graph, nodes: list[fx.Node], bits: object, block: object) -> None:
    first = nodes[0]
    columns: list[list[fx.Node | None]] = [[], [], [], []]
    sites = []
    with graph.fx.inserting_before(first):
        for node in nodes:
            weight = node.args[1]
            assert isinstance(weight, fx.Node)
            sites.append(site_of(weight, node))
            for column, part in zip(columns, (*weight.args[:3], argument(node, 2, "bias")), strict=True):
                column.append(graph.stored_node(str(part.target)) if isinstance(part, fx.Node) else None)
        inner = tuple(_block_of(node) for node in nodes)
        options: dict[str, Any] = {
            "block": block,
            "bits": bits,
            "groups": inner,
            "sites": tuple(sites),
            "split": len(nodes) > 1,
        }
        made = graph.fx.call_function(matmul_nbits, (first.args[0], *map(tuple, columns)), options)
        made.meta.update(dtype=first.meta["dtype"], shape=first.meta["shape"])
        results = [made]
        if len(nodes) > 1:
            results = [graph.fx.call_function(operator.getitem, (made, place)) for place in range(len(nodes))]
    for node, result in zip(nodes, results, strict=True):
        result.meta.update({key: node.meta[key] for key in ("dtype", "shape") if key in node.meta})
        node.replace_all_uses_with(result)
        graph.fx.erase_node(node)


def _block_of(node: fx.Node) -> object:
    """Input channels that share a scale, as the ``dequantize`` node has it."""
    weight = node.args[1]
    assert isinstance(weight, fx.Node)
    return weight.args[4]
