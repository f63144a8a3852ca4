"""4-bit floats: NVFP4 by TensorRT's own operator, MXFP4 rounded in float.

TensorRT multiplies 4-bit floats in blocks of 16 whose E4M3 scales have a scale themselves (NVFP4). For blocks of 32
with powers of two it has no product: weights are 4 bits wide until they are multiplied, inputs rounded by arithmetic.
"""

from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, fx

from qcompiler.lowering.onnx.builders.ranges import blocks_of
from qcompiler.lowering.onnx.dtypes import TORCH
from qcompiler.lowering.onnx.emitter import Builders, Emitter
from qcompiler.lowering.onnx.storage import float_chunks
from qcompiler.numerics import fp4

__all__ = ["DOMAIN", "DYNAMIC_QUANTIZE", "FLOAT4_BUILDERS"]

DOMAIN = "trt"
DYNAMIC_QUANTIZE = "TRT_FP4DynamicQuantize"

_canonical = torch.ops.qcompiler
_FLOAT, _FLOAT4, _FLOAT8 = ir.DataType.FLOAT, ir.DataType.FLOAT4E2M1, ir.DataType.FLOAT8E4M3FN
_LOWEST, _HIGHEST = -40, 15
"""Exponents of scales of MXFP4 that inputs may get: magnitudes from 4e-12 to 2e5."""


def _dynamic_quantize(e: Emitter, x_node: fx.Node, factor: fx.Node, block: int) -> tuple[ir.Value, ir.Value]:
    """Codes and E4M3 scales of blocks."""
    inputs = (e.value(x_node, e.working), e.weight(factor, _FLOAT))
    places: dict[str, Any] = {"axis": -1, "block_size": block, "scale_type": int(_FLOAT8)}
    codes, scales = e.ops(DYNAMIC_QUANTIZE, *inputs, dtypes=(_FLOAT4, _FLOAT8), domain=DOMAIN, **places)
    return codes, scales


def _scale(e: Emitter, node: fx.Node) -> ir.Value:
    x_node, factor, block, floor = node.args
    assert isinstance(x_node, fx.Node)
    assert isinstance(block, int)
    if isinstance(factor, fx.Node):
        return _dynamic_quantize(e, x_node, factor, block)[1]
    largest = e.op("ReduceMax", e.op("Abs", blocks_of(e, x_node, block)), e.const([-1]), keepdims=1)
    return _power_of_two(e, largest, floor=bool(floor))


def _power_of_two(e: Emitter, largest: ir.Value, *, floor: bool) -> ir.Value:
    """As `qcompiler.numerics.fp4.block_scale`, by counting the bounds below: exact, where a logarithm is not."""
    exponents = range(_LOWEST, _HIGHEST + 1)
    bounds = e.const([(4.0 if floor else 6.0) * 2.0**k for k in exponents], _FLOAT)
    kind = "GreaterOrEqual" if floor else "Greater"
    passed = e.cast(e.op(kind, largest, bounds, dtype=ir.DataType.BOOL), _FLOAT)
    count = e.op("ReduceSum", passed, e.const([-1]), keepdims=1)
    first = _LOWEST - 1 if floor else _LOWEST
    powers = e.const([2.0 ** (first + k) for k in range(len(exponents) + 1)], _FLOAT)
    return e.op("Gather", powers, e.cast(count, ir.DataType.INT64), axis=0)


def _quantize(e: Emitter, node: fx.Node) -> ir.Value:
    x_node, scale, factor, block = node.args
    assert isinstance(x_node, fx.Node)
    assert isinstance(scale, fx.Node)
    assert isinstance(block, int)
    if isinstance(factor, fx.Node):
        return _dynamic_quantize(e, x_node, factor, block)[0]
    return _rounded(e, e.op("Div", blocks_of(e, x_node, block), e.value(scale, _FLOAT)))


def _rounded(e: Emitter, values: ir.Value) -> ir.Value:
    """To the nearest of 0, 1/2, 1, 3/2, 2, 3, 4 and 6, ties to the even mantissa."""

    def of_steps(step: float) -> ir.Value:
        return e.op("Mul", e.op("Round", e.op("Div", values, e.const(step, _FLOAT))), e.const(step, _FLOAT))

    size = e.op("Abs", values)
    is_small, is_middle = (e.op("Less", size, e.const(bound, _FLOAT), dtype=ir.DataType.BOOL) for bound in (2.0, 4.0))
    large = e.op("Where", is_middle, of_steps(1.0), of_steps(2.0), dtype=_FLOAT)
    found = e.op("Where", is_small, of_steps(0.5), large, dtype=_FLOAT)
    return e.op("Clip", found, e.const(-6.0, _FLOAT), e.const(6.0, _FLOAT))


def _dequantize(e: Emitter, node: fx.Node) -> ir.Value:
    codes, scale, factor, block = node.args
    assert isinstance(codes, fx.Node)
    assert isinstance(scale, fx.Node)
    assert isinstance(block, int)
    if codes.op == "get_attr":
        return _weight(e, codes, scale, factor, block)
    if isinstance(factor, fx.Node):
        scales = e.op("DequantizeLinear", e.value(scale), e.weight(factor, _FLOAT), dtype=_FLOAT)
        wide = e.op("DequantizeLinear", e.value(codes), scales, dtype=_FLOAT, axis=-1, block_size=block)
        return e.cast(wide, e.working)
    *front, width = codes.meta["shape"]
    values = e.op("Mul", e.value(codes), e.value(scale))
    return e.cast(e.op("Reshape", values, e.const([*[0] * len(front), width])), e.working)


def _weight(e: Emitter, codes: fx.Node, scale: fx.Node, factor: object, block: int) -> ir.Value:
    """``[out, in]`` in the working dtype."""
    stored, name = e.codes(codes, _FLOAT4), f"{codes.target}/DequantizeLinear"
    if isinstance(factor, fx.Node):
        scales = e.op("DequantizeLinear", e.codes(scale, _FLOAT8), e.weight(factor, _FLOAT), dtype=_FLOAT)
        wide = e.op("DequantizeLinear", stored, scales, dtype=_FLOAT, axis=-1, block_size=block, name=name)
        return e.cast(wide, e.working)

    def powers() -> Tensor:
        return fp4.decode_scale(e.graph.weights.read(str(scale.target)), None)

    label = str(scale.target)
    shape = e.graph.weights.info(label).shape
    scales = e.computed(f"{label}/power", e.working, shape, float_chunks(powers, TORCH[e.working], label))
    return e.op("DequantizeLinear", stored, scales, dtype=e.working, axis=-1, block_size=block, name=name)


FLOAT4_BUILDERS: Builders = {
    _canonical.fp4_scale.default: _scale,
    _canonical.fp4_quantize.default: _quantize,
    _canonical.fp4_dequantize.default: _dequantize,
}
