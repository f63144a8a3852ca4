"""Weights from tables of values, with a sparse matrix added, as standard ONNX operators.

Nothing in ONNX multiplies by such a weight. What is written is what it is computed from, in the size it is stored in;
ONNX Runtime computes the float weight once, when it loads the model (seen in the graphs it makes).
"""

from collections.abc import Iterator

import onnx_ir as ir
import torch
from torch import Tensor, fx

from qcompiler.lowering.onnx.builders.canonical import code_dtype
from qcompiler.lowering.onnx.dtypes import dtype_of
from qcompiler.lowering.onnx.emitter import Builders, Emitter, tensor_arguments

__all__ = ["CODEBOOK_BUILDERS"]

_canonical = torch.ops.qcompiler


def _codebook_dequantize(e: Emitter, node: fx.Node) -> ir.Value:
    codes_node, table_node = tensor_arguments(node, 2)
    stored = code_dtype(e.graph.weights.info(str(codes_node.target)).dtype, e.opset)
    places = e.cast(e.codes(codes_node, stored), ir.DataType.INT32)  # GatherElements takes no narrower integers
    return e.op("GatherElements", e.weight(table_node, e.working), places, axis=1)


def _sparse_add(e: Emitter, node: fx.Node) -> ir.Value:
    """Added to the flat matrix: one place per value, 32 bits wide where the matrix is not larger than that.

    In float32: ONNX Runtime adds no other floats so.
    """
    w_node, values_node, columns_node, offsets_node = tensor_arguments(node, 4)
    w = e.value(w_node)
    rows, columns = w_node.meta["shape"]
    wide = torch.int64 if rows * columns > torch.iinfo(torch.int32).max else torch.int32
    store, names = e.graph.weights, (str(columns_node.target), str(offsets_node.target))

    def places() -> Iterator[Tensor]:
        column, offsets = (store.read(name).long() for name in names)
        yield (torch.arange(rows).repeat_interleave(offsets.diff()) * columns + column).to(wide)

    dtype = ir.DataType.INT64 if wide == torch.int64 else ir.DataType.INT32
    name = names[0].removesuffix("_columns") + "_places"
    flat = e.op("Reshape", e.cast(w, ir.DataType.FLOAT), e.const([-1]))
    values = e.cast(e.weight(values_node, dtype_of(w)), ir.DataType.FLOAT)
    place = e.computed(name, dtype, store.info(names[0]).shape, places)
    added = e.op("ScatterElements", flat, place, values, axis=0, reduction="add")
    return e.cast(e.op("Reshape", added, e.const([rows, columns])), dtype_of(w))


CODEBOOK_BUILDERS: Builders = {
    _canonical.codebook_dequantize.default: _codebook_dequantize,
    _canonical.sparse_add.default: _sparse_add,
}
