"""What a node of a graph is: a call of some operator, a quantized weight, a rounded activation."""

from collections.abc import Iterable
from typing import Any

import torch
from torch.fx import Node

import qcompiler.ir.ops  # noqa: F401  (defines torch.ops.qcompiler)

__all__ = ["activation_rounding", "is_op", "is_quantized_weight", "is_stored", "quantized_value", "stored_names"]

_canonical = torch.ops.qcompiler
_QUANTIZED_BY: dict[Any, Any] = {
    _canonical.dequantize.default: _canonical.quantize.default,
    _canonical.fp4_dequantize.default: _canonical.fp4_quantize.default,
}


def is_op(node: object, *targets: object) -> bool:
    """Whether ``node`` is a call of one of ``targets`` (operator overloads or functions)."""
    return isinstance(node, Node) and node.op == "call_function" and node.target in targets


def is_stored(node: object) -> bool:
    """Whether ``node`` stands for a stored tensor."""
    return isinstance(node, Node) and node.op == "get_attr"


def quantized_value(node: object) -> Node | None:
    """What a quantized activation was before: ``x`` of ``dequantize(quantize(x, ...), ...)``; None for other nodes."""
    if not isinstance(node, Node) or not is_op(node, *_QUANTIZED_BY):
        return None
    codes = node.args[0]
    if not isinstance(codes, Node) or not is_op(codes, _QUANTIZED_BY[node.target]):
        return None
    value = codes.args[0]
    assert isinstance(value, Node)
    return value


def activation_rounding(nodes: Iterable[Node]) -> set[Node]:
    """Of some nodes, the pairs of ``quantize`` and ``dequantize`` that round activations."""
    found: set[Node] = set()
    for node in nodes:
        if quantized_value(node) is not None:
            found |= {node, node.all_input_nodes[0]}
    return found


def is_quantized_weight(node: object) -> bool:
    """Whether a linear layer's weight is computed from codes, in one of the forms `Graph.set_weight` makes."""
    return is_op(
        node,
        _canonical.dequantize.default,
        _canonical.fp4_dequantize.default,
        _canonical.codebook_dequantize.default,
        _canonical.sparse_add.default,
    )


def stored_names(weight: Node) -> list[str]:
    """The stored tensors that a linear layer's weight is computed from, codes first."""
    if weight.op == "get_attr":
        return [str(weight.target)]
    return [name for source in weight.all_input_nodes for name in stored_names(source)]
