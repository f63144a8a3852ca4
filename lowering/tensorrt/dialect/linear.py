"""Linear layers as TensorRT fuses them: which product is made of a weight and of how its input is rounded."""

import onnx_ir as ir
import torch
from torch import fx

from qcompiler.ir import is_quantized_weight
from qcompiler.lowering.onnx.builders.canonical import matmul_weight, site_of
from qcompiler.lowering.onnx.builders.ranges import blocks_of
from qcompiler.lowering.onnx.emitter import Builders, Emitter, argument
from qcompiler.lowering.tensorrt.dialect.activations import Rounding, codes_of, rounding_of, zero_of
from qcompiler.lowering.tensorrt.dialect.weights import (
    Weight,
    multiplied,
    offsets,
    sums,
    weight_of,
)

__all__ = ["LINEAR_BUILDERS"]

_canonical = torch.ops.qcompiler
_FLOAT = ir.DataType.FLOAT
_FLOAT8 = (ir.DataType.FLOAT8E4M3FN, ir.DataType.FLOAT8E5M2)


def _linear(e: Emitter, node: fx.Node) -> ir.Value:
    x_node, weight_node = node.args[:2]
    assert isinstance(x_node, fx.Node)
    assert isinstance(weight_node, fx.Node)
    weight, rounding = weight_of(e, weight_node), rounding_of(x_node)
    site = site_of(weight_node, node)
    if weight is not None and rounding is not None and _is_product(weight, rounding):
        result = _product(e, weight, rounding, site)
    else:
        x = _input(e, x_node, rounding)
        result = _by_weight(e, x, x_node, weight_node, weight, site)
    if is_quantized_weight(weight_node):
        e.products.setdefault(site, f"{site}/MatMul")
    bias = argument(node, 2, "bias")
    if bias is not None:
        result = e.op("Add", result, e.value(bias, result.dtype), name=f"{site}/Add")
    return e.cast(result, e.working)


def _is_product(weight: Weight, rounding: Rounding) -> bool:
    """Whether codes are multiplied with codes: both of 8 bits and one kind, a scale per channel and one per row."""
    both = weight.is_float8 == rounding.is_float8 and weight.bits == rounding.bits == 8
    return both and not weight.is_blocked and not weight.has_zero_point and not rounding.block


def _product(e: Emitter, weight: Weight, rounding: Rounding, site: str) -> ir.Value:
    """float32: codes times codes.

    In float32 around the product, not in float16: there the builder multiplies by the scales of channels behind it, and
    what comes out ahead of that is the result over a weight's scale, which does not fit.
    """
    x = e.cast(e.value(rounding.source, e.float_like(rounding.source)), _FLOAT)
    scale = e.value(rounding.scale, _FLOAT)
    matrix = multiplied(e, weight, _FLOAT)
    if rounding.is_static and rounding.zero_point is None:
        code = ir.DataType.FLOAT8E4M3FN if rounding.is_float8 else ir.DataType.INT8
        codes = e.op("QuantizeLinear", x, scale, dtype=code, output_dtype=int(code))
        rounded = e.op("DequantizeLinear", codes, scale, dtype=_FLOAT)
        return e.op("MatMul", rounded, matrix, name=f"{site}/MatMul")
    values, shift = e.op("Div", x, scale), None
    if rounding.zero_point is not None:  # codes of 0 to 255 become those of -128 to 127
        shift = e.op("Sub", zero_of(e, rounding.zero_point), e.const(128.0, _FLOAT))
        values = e.op("Add", e.op("Round", values), shift)
    codes = codes_of(e, values, rounding.dtype, 8)
    rounded = e.op("DequantizeLinear", codes, e.const(1.0, _FLOAT), dtype=_FLOAT)
    product = e.op("MatMul", rounded, matrix, name=f"{site}/MatMul")
    if shift is not None:
        product = e.op("Sub", product, e.op("Mul", shift, sums(e, weight)))
    return e.op("Mul", product, scale)


def _input(e: Emitter, x_node: fx.Node, rounding: Rounding | None) -> ir.Value:
    """A linear layer's input in the working dtype, rounded where it is; the product sees floats."""
    if rounding is None:
        return e.value(x_node, e.working)
    last = e.const([-1])
    scale = e.value(rounding.scale, _FLOAT)
    if rounding.block:
        values, scale = blocks_of(e, rounding.source, rounding.block), e.op("Unsqueeze", scale, last)
    else:
        values = e.cast(e.value(rounding.source, e.float_like(rounding.source)), _FLOAT)
    values = e.op("Div", values, scale)
    if rounding.is_float8:
        codes = codes_of(e, values, rounding.dtype, 8)
        values = e.op("DequantizeLinear", codes, e.const(1.0, _FLOAT), dtype=_FLOAT)
    else:
        values = _limited(e, values, rounding)
    values = e.op("Mul", values, scale)
    if rounding.block:
        *front, width = rounding.source.meta["shape"]
        values = e.op("Reshape", values, e.const([*[0] * len(front), width]))
    return e.cast(values, e.working)


def _limited(e: Emitter, values: ir.Value, rounding: Rounding) -> ir.Value:
    """Whole numbers within the codes, relative to the zero point."""
    values = e.op("Round", values)
    if rounding.zero_point is None:
        half = float(1 << (rounding.bits - 1))
        return e.op("Clip", values, e.const(-half, _FLOAT), e.const(half - 1, _FLOAT))
    zero = zero_of(e, rounding.zero_point)
    highest = e.const(float((1 << rounding.bits) - 1), _FLOAT)
    codes = e.op("Clip", e.op("Add", values, zero), e.const(0.0, _FLOAT), highest)
    return e.op("Sub", codes, zero)


def _by_weight(
    e: Emitter, x: ir.Value, x_node: fx.Node, weight_node: fx.Node, weight: Weight | None, site: str
) -> ir.Value:
    """Floats times a weight of any kind, in the working dtype."""
    if weight is None:
        return e.op("MatMul", x, matmul_weight(e, weight_node, e.working), name=f"{site}/MatMul")
    if weight.bits == 8 and not weight.is_blocked:
        e.floats_times_bytes.add(site)
    result = e.op("MatMul", x, multiplied(e, weight, e.working), name=f"{site}/MatMul")
    if not weight.has_zero_point:
        return result
    *front, width = x_node.meta["shape"]
    blocks = e.op("Reshape", x, e.const([*[0] * len(front), width // weight.block, weight.block]))
    means = e.op("ReduceMean", blocks, e.const([-1]), keepdims=0)
    return e.op("Sub", result, e.op("MatMul", means, offsets(e, weight, e.working)))


LINEAR_BUILDERS: Builders = {_canonical.linear.default: _linear}
