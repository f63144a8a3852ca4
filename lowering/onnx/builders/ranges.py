"""Scales and zero points of activations that are measured as the model runs, in float32."""

import onnx_ir as ir
import torch
from torch import fx

from qcompiler.lowering.onnx.emitter import Emitter, argument

__all__ = ["block_range", "blocks_of", "dynamic_range"]

_FLOAT = ir.DataType.FLOAT
_LARGEST_CODE = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}
_SMALLEST_SCALE, _LARGEST_SCALE = 2.0**-23, 65504.0


def blocks_of(e: Emitter, x_node: fx.Node, block: int) -> ir.Value:
    """A float tensor in float32, its last axis cut into blocks."""
    *front, width = x_node.meta["shape"]
    wide = e.cast(e.value(x_node, e.float_like(x_node)), _FLOAT)
    return e.op("Reshape", wide, e.const([*[0] * len(front), width // block, block]))


def dynamic_range(e: Emitter, node: fx.Node) -> tuple[ir.Value, ir.Value | None]:
    """What ``choose_qparams`` gives, in float32: the scale, positive in float16 too; the zero point of uint8 codes."""
    x_node, dtype, axis = node.args[0], node.args[1], argument(node, 2, "axis")
    bits, clip, block = argument(node, 3, "bits") or 8, argument(node, 4, "clip") or 1.0, argument(node, 5, "block")
    assert isinstance(bits, int) and isinstance(x_node, fx.Node)  # noqa: PT018
    x = e.value(x_node, e.float_like(x_node))
    wide = blocks_of(e, x_node, block) if block else e.cast(x, _FLOAT)
    axes = None if axis is None else e.const([axis])

    def reduce(kind: str, value: ir.Value) -> ir.Value:
        found = e.op(kind, value, axes, keepdims=int(axis is not None and not block))
        return found if clip == 1 else e.op("Mul", found, e.const(clip, _FLOAT))

    smallest = e.const(_SMALLEST_SCALE, _FLOAT)
    if dtype != torch.uint8:
        assert isinstance(dtype, torch.dtype)
        amax = reduce("ReduceMax", e.op("Abs", wide))
        largest = _LARGEST_CODE.get(dtype, (1 << (bits - 1)) - 0.5)
        return e.op("Max", e.op("Div", amax, e.const(largest, _FLOAT)), smallest), None
    none, most = e.const(0.0, _FLOAT), e.const(float((1 << bits) - 1), _FLOAT)
    low, high = e.op("Min", reduce("ReduceMin", wide), none), e.op("Max", reduce("ReduceMax", wide), none)
    scale = e.op("Max", e.op("Div", e.op("Sub", high, low), most), smallest)
    return scale, e.op("Clip", e.op("Round", e.op("Div", e.op("Neg", low), scale)), none, most)


def block_range(e: Emitter, node: fx.Node) -> tuple[ir.Value, ir.Value | None]:
    """What ``choose_block_qparams`` gives: the scale in float16; in float32 the zero point of uint8 codes."""
    x_node, dtype, block = node.args[:3]
    bits = argument(node, 3, "bits", 8)
    assert isinstance(x_node, fx.Node)
    assert isinstance(dtype, torch.dtype)
    assert isinstance(block, int)
    blocks, last = blocks_of(e, x_node, block), e.const([-1])

    def scale_of(reach: ir.Value, largest: float) -> ir.Value:
        found = e.op("Max", e.op("Div", reach, e.const(largest, _FLOAT)), e.const(_SMALLEST_SCALE, _FLOAT))
        return e.cast(e.op("Min", found, e.const(_LARGEST_SCALE, _FLOAT)), ir.DataType.FLOAT16)

    if dtype != torch.uint8:
        amax = e.op("ReduceMax", e.op("Abs", blocks), last, keepdims=0)
        return scale_of(amax, _LARGEST_CODE.get(dtype, (1 << (bits - 1)) - 1.0)), None
    none, most = e.const(0.0, _FLOAT), float((1 << bits) - 1)
    low = e.op("Min", e.op("ReduceMin", blocks, last, keepdims=0), none)
    high = e.op("Max", e.op("ReduceMax", blocks, last, keepdims=0), none)
    scale = scale_of(e.op("Sub", high, low), most)
    zero = e.op("Round", e.op("Div", e.op("Neg", low), e.cast(scale, _FLOAT)))
    return scale, e.op("Clip", zero, none, e.const(most, _FLOAT))
