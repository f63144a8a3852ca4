"""Mixtures of experts without NonZero, which TensorRT has in a plugin only: every expert computes every row.

Rows are chosen behind the experts instead of ahead of them: the same numbers, and the work of all experts.
"""

import onnx_ir as ir
import torch
from torch import fx

from qcompiler.lowering.onnx.emitter import Builders, Emitter, tensor_arguments

__all__ = ["EXPERT_BUILDERS"]

_canonical = torch.ops.qcompiler


def _take_expert(e: Emitter, node: fx.Node) -> ir.Value:
    (x,) = tensor_arguments(node, 1)
    return e.value(x)


def _merge_experts(e: Emitter, node: fx.Node) -> ir.Value:
    rows, experts_node = node.args
    assert isinstance(rows, (list, tuple))
    dtype = e.float_like(*rows)
    experts = e.op("Unsqueeze", e.value(experts_node, ir.DataType.INT64), e.const([1]))
    merged = e.const(0.0, dtype)
    for index, part in enumerate(rows):
        is_here = e.op("Equal", experts, e.const(index), dtype=ir.DataType.BOOL)
        merged = e.op("Where", is_here, e.value(part, dtype), merged, dtype=dtype)
    return merged


EXPERT_BUILDERS: Builders = {
    _canonical.take_expert.default: _take_expert,
    _canonical.merge_experts.default: _merge_experts,
}
