"""ATen operators that work element by element, as standard ONNX operators."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import fx

from qcompiler.errors import TargetError
from qcompiler.lowering.onnx.dtypes import FLOATS, dtype_of, onnx_dtype
from qcompiler.lowering.onnx.emitter import Builder, Builders, Emitter, argument

__all__ = ["ELEMENTWISE_BUILDERS", "result_dtype"]

_aten = torch.ops.aten
_BOOL, _FLOAT, _INT64 = ir.DataType.BOOL, ir.DataType.FLOAT, ir.DataType.INT64


def result_dtype(e: Emitter, node: fx.Node, *sources: object) -> ir.DataType:
    """The dtype of a node's result: as torch says, floats narrowed to the working dtype where ``sources`` are."""
    wanted = onnx_dtype(node.meta["dtype"])
    return e.float_like(*(sources or node.args)) if wanted == _FLOAT else wanted


# --- element by element ----------------------------------------------------------------------------------------------


def _unary(kind: str) -> Builder:
    def build(e: Emitter, node: fx.Node) -> ir.Value:
        return e.op(kind, e.value(node.args[0], result_dtype(e, node)))

    return build


def _binary(kind: str) -> Builder:
    def build(e: Emitter, node: fx.Node) -> ir.Value:
        if node.kwargs.get("alpha", 1) != 1:
            raise TargetError("add and sub with alpha have no builder", where=node.name, got=node.kwargs["alpha"])
        dtype = result_dtype(e, node)
        return e.op(kind, e.value(node.args[0], dtype), e.value(node.args[1], dtype))

    return build


def _reverse_subtract(e: Emitter, node: fx.Node) -> ir.Value:
    dtype = result_dtype(e, node)
    return e.op("Sub", e.value(node.args[1], dtype), e.value(node.args[0], dtype))


def _divide(e: Emitter, node: fx.Node) -> ir.Value:
    mode = argument(node, 2, "rounding_mode")
    dtype = result_dtype(e, node)
    left, right = e.value(node.args[0], dtype), e.value(node.args[1], dtype)
    if mode is None:
        return e.op("Div", left, right)
    if dtype in FLOATS:
        return e.op("Floor", e.op("Div", left, right)) if mode == "floor" else _truncate(e, e.op("Div", left, right))
    if mode == "trunc":
        return e.op("Div", left, right)  # ONNX integer division truncates
    return e.op("Div", e.op("Sub", left, e.op("Mod", left, right)), right)  # Mod takes the divisor's sign


def _truncate(e: Emitter, value: ir.Value) -> ir.Value:
    return e.op("Mul", e.op("Sign", value), e.op("Floor", e.op("Abs", value)))


def _floor_divide(e: Emitter, node: fx.Node) -> ir.Value:
    dtype = result_dtype(e, node)
    left, right = e.value(node.args[0], dtype), e.value(node.args[1], dtype)
    if dtype in FLOATS:
        return e.op("Floor", e.op("Div", left, right))
    return e.op("Div", e.op("Sub", left, e.op("Mod", left, right)), right)


def _remainder(e: Emitter, node: fx.Node) -> ir.Value:
    dtype = result_dtype(e, node)
    left, right = e.value(node.args[0], dtype), e.value(node.args[1], dtype)
    if dtype in FLOATS:
        return e.op("Sub", left, e.op("Mul", right, e.op("Floor", e.op("Div", left, right))))
    return e.op("Mod", left, right)


def _power(e: Emitter, node: fx.Node) -> ir.Value:
    dtype = result_dtype(e, node)
    return e.op("Pow", e.value(node.args[0], dtype), e.value(node.args[1], dtype))


def _reciprocal_root(e: Emitter, node: fx.Node) -> ir.Value:
    return e.op("Reciprocal", e.op("Sqrt", e.value(node.args[0], result_dtype(e, node))))


def _square(e: Emitter, node: fx.Node) -> ir.Value:
    x = e.value(node.args[0], result_dtype(e, node))
    return e.op("Mul", x, x)


def _one_apart(kind: str, before: float, after: float) -> Builder:
    """``log1p`` and ``expm1``, whose accuracy near zero ONNX has no operator for."""

    def build(e: Emitter, node: fx.Node) -> ir.Value:
        x = e.value(node.args[0], result_dtype(e, node))
        if before:
            x = e.op("Add", x, e.value(before, dtype_of(x)))
        x = e.op(kind, x)
        return e.op("Add", x, e.value(after, dtype_of(x))) if after else x

    return build


def _silu(e: Emitter, node: fx.Node) -> ir.Value:
    x = e.value(node.args[0], result_dtype(e, node))
    return e.op("Mul", x, e.op("Sigmoid", x))


def _gelu(e: Emitter, node: fx.Node) -> ir.Value:
    return e.op(
        "Gelu", e.value(node.args[0], result_dtype(e, node)), approximate=node.kwargs.get("approximate", "none")
    )


def _comparison(kind: str, *, negate: bool = False) -> Builder:
    def build(e: Emitter, node: fx.Node) -> ir.Value:
        dtype = _common(e, node.args[:2])
        if dtype == _BOOL and kind != "Equal":
            dtype = _INT64
        found = e.op(kind, e.value(node.args[0], dtype), e.value(node.args[1], dtype), dtype=_BOOL)
        return e.op("Not", found) if negate else found

    return build


def _common(e: Emitter, args: Sequence[object]) -> ir.DataType:
    """The dtype in which torch compares two values: that of the tensors, unless a number is of a higher kind."""
    probes: list[Any] = []
    for arg in args:
        if isinstance(arg, fx.Node):
            shape = [1] * len(arg.meta["shape"]) if "shape" in arg.meta else []
            probes.append(torch.empty(shape, dtype=arg.meta.get("dtype", torch.int64)))
        else:
            probes.append(arg)
    promoted = torch.result_type(probes[0], probes[1])
    return e.float_like(*args) if onnx_dtype(promoted) == _FLOAT else onnx_dtype(promoted)


def _logical(kind: str, bitwise: str | None = None) -> Builder:
    def build(e: Emitter, node: fx.Node) -> ir.Value:
        dtype = onnx_dtype(node.meta["dtype"]) if bitwise else _BOOL
        name = kind if dtype == _BOOL or bitwise is None else bitwise
        return e.op(name, *(e.value(arg, dtype) for arg in node.args))

    return build


def _where(e: Emitter, node: fx.Node) -> ir.Value:
    dtype = result_dtype(e, node, *node.args[1:])
    return e.op(
        "Where", e.value(node.args[0], _BOOL), e.value(node.args[1], dtype), e.value(node.args[2], dtype), dtype=dtype
    )


def _masked_fill(e: Emitter, node: fx.Node) -> ir.Value:
    dtype = result_dtype(e, node, node.args[0])
    fill = node.args[2]
    if isinstance(fill, float) and dtype == ir.DataType.FLOAT16:
        fill = float(np.clip(fill, -65504.0, 65504.0)) if math.isfinite(fill) else fill
    return e.op("Where", e.value(node.args[1], _BOOL), e.value(fill, dtype), e.value(node.args[0], dtype), dtype=dtype)


def _clamp(e: Emitter, node: fx.Node) -> ir.Value:
    dtype = result_dtype(e, node)
    low, high = argument(node, 1, "min"), argument(node, 2, "max")
    x = e.value(node.args[0], dtype)
    if low is not None:
        x = e.op("Max", x, e.value(low, dtype))
    return x if high is None else e.op("Min", x, e.value(high, dtype))


# --- dtype and identity ----------------------------------------------------------------------------------------------


def _to_dtype(e: Emitter, node: fx.Node) -> ir.Value:
    """A cast; between floats of torch (float32, bfloat16, float16) nothing happens, as all are computed in one."""
    source = e.value(node.args[0])
    wanted = onnx_dtype(node.meta["dtype"])
    return source if wanted == _FLOAT and source.dtype in (_FLOAT, e.working) else e.cast(source, wanted)


def _identity(e: Emitter, node: fx.Node) -> ir.Value:
    return e.value(node.args[0])


ELEMENTWISE_BUILDERS: Builders = {
    _aten.add.Tensor: _binary("Add"),
    _aten.add.Scalar: _binary("Add"),
    _aten.sub.Tensor: _binary("Sub"),
    _aten.sub.Scalar: _binary("Sub"),
    _aten.rsub.Scalar: _reverse_subtract,
    _aten.rsub.Tensor: _reverse_subtract,
    _aten.mul.Tensor: _binary("Mul"),
    _aten.mul.Scalar: _binary("Mul"),
    _aten.div.Tensor: _divide,
    _aten.div.Scalar: _divide,
    _aten.div.Tensor_mode: _divide,
    _aten.div.Scalar_mode: _divide,
    _aten.floor_divide.default: _floor_divide,
    _aten.remainder.Scalar: _remainder,
    _aten.remainder.Tensor: _remainder,
    _aten.pow.Tensor_Scalar: _power,
    _aten.pow.Tensor_Tensor: _power,
    _aten.pow.Scalar: _power,
    _aten.maximum.default: _binary("Max"),
    _aten.minimum.default: _binary("Min"),
    _aten.neg.default: _unary("Neg"),
    _aten.abs.default: _unary("Abs"),
    _aten.sqrt.default: _unary("Sqrt"),
    _aten.rsqrt.default: _reciprocal_root,
    _aten.reciprocal.default: _unary("Reciprocal"),
    _aten.exp.default: _unary("Exp"),
    _aten.log.default: _unary("Log"),
    _aten.cos.default: _unary("Cos"),
    _aten.sin.default: _unary("Sin"),
    _aten.tanh.default: _unary("Tanh"),
    _aten.sigmoid.default: _unary("Sigmoid"),
    _aten.relu.default: _unary("Relu"),
    _aten.erf.default: _unary("Erf"),
    _aten.floor.default: _unary("Floor"),
    _aten.ceil.default: _unary("Ceil"),
    _aten.round.default: _unary("Round"),
    _aten.sign.default: _unary("Sign"),
    _aten.softplus.default: _unary("Softplus"),
    _aten.square.default: _square,
    _aten.log1p.default: _one_apart("Log", 1.0, 0.0),
    _aten.expm1.default: _one_apart("Exp", 0.0, -1.0),
    _aten.silu.default: _silu,
    _aten.gelu.default: _gelu,
    _aten.clamp.default: _clamp,
    _aten.clamp.Tensor: _clamp,
    _aten.clamp_min.default: _clamp,
    _aten.clamp_max.default: lambda e, node: e.op(
        "Min", e.value(node.args[0], result_dtype(e, node)), e.value(node.args[1], result_dtype(e, node))
    ),
    _aten.eq.Tensor: _comparison("Equal"),
    _aten.eq.Scalar: _comparison("Equal"),
    _aten.ne.Tensor: _comparison("Equal", negate=True),
    _aten.ne.Scalar: _comparison("Equal", negate=True),
    _aten.lt.Tensor: _comparison("Less"),
    _aten.lt.Scalar: _comparison("Less"),
    _aten.le.Tensor: _comparison("LessOrEqual"),
    _aten.le.Scalar: _comparison("LessOrEqual"),
    _aten.gt.Tensor: _comparison("Greater"),
    _aten.gt.Scalar: _comparison("Greater"),
    _aten.ge.Tensor: _comparison("GreaterOrEqual"),
    _aten.ge.Scalar: _comparison("GreaterOrEqual"),
    _aten.logical_and.default: _logical("And"),
    _aten.logical_or.default: _logical("Or"),
    _aten.logical_xor.default: _logical("Xor"),
    _aten.logical_not.default: _logical("Not"),
    _aten.bitwise_and.Tensor: _logical("And", "BitwiseAnd"),
    _aten.bitwise_and.Scalar: _logical("And", "BitwiseAnd"),
    _aten.bitwise_or.Tensor: _logical("Or", "BitwiseOr"),
    _aten.bitwise_or.Scalar: _logical("Or", "BitwiseOr"),
    _aten.bitwise_xor.Tensor: _logical("Xor", "BitwiseXor"),
    _aten.bitwise_not.default: _logical("Not", "BitwiseNot"),
    _aten.__and__.Tensor: _logical("And", "BitwiseAnd"),
    _aten.__or__.Tensor: _logical("Or", "BitwiseOr"),
    _aten.where.self: _where,
    _aten.where.ScalarOther: _where,
    _aten.where.ScalarSelf: _where,
    _aten.where.Scalar: _where,
    _aten.masked_fill.Scalar: _masked_fill,
    _aten.masked_fill.Tensor: _masked_fill,
    _aten.to.dtype: _to_dtype,
    _aten.to.device: _to_dtype,
    _aten.to.dtype_layout: _to_dtype,
    _aten.to.other: _to_dtype,
    _aten._to_copy.default: _to_dtype,
    _aten.type_as.default: _to_dtype,
    _aten.contiguous.default: _identity,
    _aten.clone.default: _identity,
    _aten.detach.default: _identity,
    _aten.detach_.default: _identity,
    _aten.alias.default: _identity,
    _aten.lift_fresh_copy.default: _identity,
    _aten.dropout.default: _identity,
    _aten.max.other: _binary("Max"),
    _aten.min.other: _binary("Min"),
}
