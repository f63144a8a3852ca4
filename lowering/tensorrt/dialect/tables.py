"""Embedding tables of codes: one DequantizeLinear of the whole table, and the rows that are wanted of that.

Source: what the builder of TensorRT for RTX 1.7 makes of hand-made graphs: one kernel that gathers codes and multiplies
them by the scales of their rows or blocks, so that the plan holds no floats. Codes that are gathered ahead of
DequantizeLinear it refuses.
"""

import onnx_ir as ir
import torch
from torch import fx

from qcompiler.ir import is_op
from qcompiler.lowering.onnx.dtypes import onnx_dtype
from qcompiler.lowering.onnx.emitter import Builders, Emitter

__all__ = ["TABLE_BUILDERS", "is_table", "rows_of_table"]

_dequantize, _embedding = torch.ops.qcompiler.dequantize.default, torch.ops.aten.embedding.default
_STORED = {"int8": ir.DataType.INT8, "int4": ir.DataType.INT4, "int3": ir.DataType.INT4, "int2": ir.DataType.INT4}


def is_table(node: fx.Node) -> bool:
    """Whether a ``dequantize`` node gives rows of a table of codes."""
    return is_op(node, _dequantize) and is_op(node.args[0], _embedding)


def rows_of_table(e: Emitter, node: fx.Node) -> ir.Value:
    """Rows in the working dtype."""
    (codes, ids), (scale, _) = (part.args[:2] for part in node.args[:2])  # type: ignore[union-attr]
    assert isinstance(codes, fx.Node)
    assert isinstance(scale, fx.Node)
    info = e.graph.weights.info(str(codes.target))
    columns = info.shape[1]
    groups = e.graph.weights.info(str(scale.target)).shape[1]
    dtype = _STORED[info.dtype] if info.dtype in _STORED else onnx_dtype(getattr(torch, info.dtype))
    places = {"axis": 0} if groups == 1 else {"axis": 1, "block_size": columns // groups}
    name = f"{codes.target}/DequantizeLinear"
    inputs = e.codes(codes, dtype), e.weight(scale, e.working, flat=groups == 1)
    table = e.op("DequantizeLinear", *inputs, dtype=e.working, name=name, **places)
    return e.op("Gather", table, e.value(ids), axis=0, name=f"{codes.target}/Gather")


def _chosen(e: Emitter, node: fx.Node) -> ir.Value:
    """A row of a table; of codes and scales nothing, as `rows_of_table` chooses behind DequantizeLinear."""
    table, ids = node.args[:2]
    if any(is_table(user) and node in user.args[:3] for user in node.users):
        return e.value(ids)
    return e.op("Gather", e.value(table, e.working), e.value(ids), axis=0)


TABLE_BUILDERS: Builders = {_embedding: _chosen}
