"""Mixtures of experts: every expert works on the rows routed to it, found with NonZero when the model runs."""

import onnx_ir as ir
import torch
from torch import fx

from qcompiler.lowering.onnx.dtypes import dtype_of
from qcompiler.lowering.onnx.emitter import Builders, Emitter, tensor_arguments

__all__ = ["EXPERT_BUILDERS"]

_canonical = torch.ops.qcompiler
_BOOL, _INT64 = ir.DataType.BOOL, ir.DataType.INT64


def _places(e: Emitter, experts: ir.Value, index: int) -> ir.Value:
    """Which rows go to an expert, int64 ``[n]``; emitted once for all that ask."""
    is_here = e.op("Equal", experts, e.const(index), dtype=_BOOL)
    return e.op("Reshape", e.op("NonZero", is_here, dtype=_INT64), e.const([-1]))


def _take_expert(e: Emitter, node: fx.Node) -> ir.Value:
    x, experts = tensor_arguments(node, 2)
    index = node.args[2]
    assert isinstance(index, int)
    return e.op("Gather", e.value(x), _places(e, e.value(experts, _INT64), index), axis=0)


def _merge_experts(e: Emitter, node: fx.Node) -> ir.Value:
    rows, experts_node = node.args
    assert isinstance(rows, (list, tuple))
    assert isinstance(experts_node, fx.Node)
    dtype = e.float_like(*rows)
    experts = e.value(experts_node, _INT64)
    places = e.op("Concat", *(_places(e, experts, index) for index in range(len(rows))), axis=0)
    merged = e.op("Concat", *(e.value(part, dtype) for part in rows), axis=0)
    shape = e.op("Concat", e.size(experts_node, 0), e.const([node.meta["shape"][1]]), axis=0)
    empty = e.op("Expand", e.const(0.0, dtype_of(merged)), shape)
    return e.op("ScatterND", empty, e.op("Unsqueeze", places, e.const([1])), merged)


EXPERT_BUILDERS: Builders = {
    _canonical.take_expert.default: _take_expert,
    _canonical.merge_experts.default: _merge_experts,
}
