"""ATen reductions, products, norms and attention beside the canonical operators, as standard ONNX operators."""

from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from qcompiler.errors import TargetError
from qcompiler.lowering.onnx.builders.attention import attend
from qcompiler.lowering.onnx.builders.canonical import layer_norm, matmul_weight
from qcompiler.lowering.onnx.builders.elementwise import result_dtype
from qcompiler.lowering.onnx.dtypes import dtype_of
from qcompiler.lowering.onnx.emitter import Builder, Builders, Emitter, argument, tensor_arguments

__all__ = ["PRODUCT_BUILDERS"]

_aten = torch.ops.aten
_BOOL, _FLOAT, _INT64 = ir.DataType.BOOL, ir.DataType.FLOAT, ir.DataType.INT64


def _axes(axes: object) -> list[int]:
    return [axes] if isinstance(axes, int) else list(axes)  # type: ignore[call-overload]


# --- reductions ------------------------------------------------------------------------------------------------------


def _reduce(kind: str) -> Builder:
    def build(e: Emitter, node: fx.Node) -> ir.Value:
        axes, keep = argument(node, 1, "dim"), argument(node, 2, "keepdim", False)
        x = e.value(node.args[0], result_dtype(e, node))
        return e.op(kind, x, None if axes in (None, [], ()) else e.const(_axes(axes)), keepdims=int(keep))

    return build


def _reduce_all(kind: str) -> Builder:
    def build(e: Emitter, node: fx.Node) -> ir.Value:
        return e.op(kind, e.value(node.args[0], result_dtype(e, node)), keepdims=0)

    return build


def _extreme(kind: str, index: str) -> Builder:
    """``max.dim``: the values and where they are."""

    def build(e: Emitter, node: fx.Node) -> tuple[ir.Value, ...]:
        axis, keep = node.args[1], argument(node, 2, "keepdim", False)
        x = e.value(node.args[0])
        return (
            e.op(kind, x, e.const([axis]), keepdims=int(keep)),
            e.op(index, x, dtype=_INT64, axis=axis, keepdims=int(keep)),
        )

    return build


def _arg_extreme(kind: str) -> Builder:
    def build(e: Emitter, node: fx.Node) -> ir.Value:
        axis, keep = argument(node, 1, "dim"), argument(node, 2, "keepdim", False)
        x = e.value(node.args[0])
        if axis is None:
            return e.op("Squeeze", e.op(kind, e.op("Reshape", x, e.const([-1])), dtype=_INT64, axis=0, keepdims=1))
        return e.op(kind, x, dtype=_INT64, axis=axis, keepdims=int(keep))

    return build


def _any(e: Emitter, node: fx.Node) -> ir.Value:
    axis, keep = argument(node, 1, "dim"), argument(node, 2, "keepdim", False)
    x = e.cast(e.value(node.args[0], _BOOL), ir.DataType.INT32)
    return e.cast(e.op("ReduceMax", x, None if axis is None else e.const(_axes(axis)), keepdims=int(keep)), _BOOL)


def _all(e: Emitter, node: fx.Node) -> ir.Value:
    axis, keep = argument(node, 1, "dim"), argument(node, 2, "keepdim", False)
    x = e.cast(e.value(node.args[0], _BOOL), ir.DataType.INT32)
    return e.cast(e.op("ReduceMin", x, None if axis is None else e.const(_axes(axis)), keepdims=int(keep)), _BOOL)


def _cumulative_sum(e: Emitter, node: fx.Node) -> ir.Value:
    return e.op("CumSum", e.value(node.args[0], result_dtype(e, node)), e.const(node.args[1]))


def _softmax(e: Emitter, node: fx.Node) -> ir.Value:
    x = e.value(node.args[0])
    result = e.float_like(node.args[0])
    return e.cast(e.op("Softmax", e.cast(x, _FLOAT), axis=node.args[1]), result)


def _topk(e: Emitter, node: fx.Node) -> tuple[ir.Value, ...]:
    axis, largest = argument(node, 2, "dim", -1), argument(node, 3, "largest", True)
    x = e.value(node.args[0])
    count = e.size_value(node.args[1])
    return e.ops("TopK", x, count, dtypes=(dtype_of(x), _INT64), axis=axis, largest=int(largest), sorted=1)


# --- products and norms ----------------------------------------------------------------------------------------------


def _matmul(e: Emitter, node: fx.Node) -> ir.Value:
    dtype = result_dtype(e, node)
    return e.op("MatMul", e.value(node.args[0], dtype), e.value(node.args[1], dtype))


def _addmm(e: Emitter, node: fx.Node) -> ir.Value:
    if node.kwargs:
        raise TargetError("addmm with alpha or beta has no builder", where=node.name, got=dict(node.kwargs))
    dtype = result_dtype(e, node)
    bias, left, right = (e.value(arg, dtype) for arg in node.args)
    return e.op("Add", e.op("MatMul", left, right), bias)


def _linear(e: Emitter, node: fx.Node) -> ir.Value:
    dtype = result_dtype(e, node)
    weight, bias = node.args[1], argument(node, 2, "bias")
    assert isinstance(weight, fx.Node)
    result = e.op("MatMul", e.value(node.args[0], dtype), matmul_weight(e, weight, dtype))
    return result if bias is None else e.op("Add", result, e.value(bias, dtype))


def _embedding(e: Emitter, node: fx.Node) -> ir.Value:
    return e.op("Gather", e.value(node.args[0], e.working), e.value(node.args[1]), axis=0)


def _layer_norm(e: Emitter, node: fx.Node) -> ir.Value:
    x, shape = node.args[:2]
    if len(shape) != 1:  # type: ignore[arg-type]
        raise TargetError("layer_norm over several axes has no builder", where=node.name, got=shape)
    weight, bias = argument(node, 2, "weight"), argument(node, 3, "bias")
    assert isinstance(x, fx.Node)
    return layer_norm(e, e.value(x, e.float_like(x)), weight, bias, argument(node, 4, "eps", 1e-5), e.dim(x, -1))


def _attention(e: Emitter, node: fx.Node) -> ir.Value:
    q, k, v = tensor_arguments(node, 3)
    if argument(node, 4, "dropout_p", 0.0):
        raise TargetError("attention with dropout", where=node.name, remedy="capture the model in evaluation mode")
    scale: Any = node.kwargs.get("scale")
    return attend(
        e,
        q,
        k,
        v,
        argument(node, 3, "attn_mask"),
        scale=q.meta["shape"][-1] ** -0.5 if scale is None else scale,
        causal=bool(argument(node, 5, "is_causal", False)),
        aligned_to_end=False,
    )


PRODUCT_BUILDERS: Builders = {
    _aten.mean.dim: _reduce("ReduceMean"),
    _aten.mean.default: _reduce_all("ReduceMean"),
    _aten.sum.dim_IntList: _reduce("ReduceSum"),
    _aten.sum.default: _reduce_all("ReduceSum"),
    _aten.logsumexp.default: _reduce("ReduceLogSumExp"),
    _aten.amax.default: _reduce("ReduceMax"),
    _aten.amin.default: _reduce("ReduceMin"),
    _aten.max.default: _reduce_all("ReduceMax"),
    _aten.min.default: _reduce_all("ReduceMin"),
    _aten.max.dim: _extreme("ReduceMax", "ArgMax"),
    _aten.min.dim: _extreme("ReduceMin", "ArgMin"),
    _aten.argmax.default: _arg_extreme("ArgMax"),
    _aten.argmin.default: _arg_extreme("ArgMin"),
    _aten.any.default: _any,
    _aten.any.dim: _any,
    _aten.all.default: _all,
    _aten.all.dim: _all,
    _aten.cumsum.default: _cumulative_sum,
    _aten.softmax.int: _softmax,
    _aten._softmax.default: _softmax,
    _aten.topk.default: _topk,
    _aten.matmul.default: _matmul,
    _aten.bmm.default: _matmul,
    _aten.mm.default: _matmul,
    _aten.addmm.default: _addmm,
    _aten.linear.default: _linear,
    _aten.embedding.default: _embedding,
    _aten.layer_norm.default: _layer_norm,
    _aten.native_layer_norm.default: lambda e, node: (_layer_norm(e, node),),
    _aten.scaled_dot_product_attention.default: _attention,
}
