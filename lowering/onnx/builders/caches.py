"""Quantized key-value caches in standard ONNX operators: ranges of blocks, bytes of two codes, appending."""

import operator

import onnx_ir as ir
import torch
from torch import fx

from qcompiler.ir import is_op
from qcompiler.lowering.onnx.builders.ranges import block_range, blocks_of
from qcompiler.lowering.onnx.dtypes import dtype_of
from qcompiler.lowering.onnx.emitter import Builders, Emitter

__all__ = [
    "CACHE_BUILDERS",
    "dequantize_shared",
    "is_of_blocks",
    "is_shared",
    "quantize_blocks",
    "quantize_shared",
]

_canonical = torch.ops.qcompiler
_FLOAT = ir.DataType.FLOAT
_FLOAT8 = (ir.DataType.FLOAT8E4M3FN, ir.DataType.FLOAT8E5M2)


def _kv_append(e: Emitter, node: fx.Node) -> ir.Value:
    """Concat; ONNX Runtime has none of float8, so its numbers become floats, and codes again behind it.

    DequantizeLinear and QuantizeLinear with a scale of one change no code, whatever the cache's own scale is.
    """
    past = e.value(node.args[0])
    dtype = dtype_of(past)
    new = e.value(node.args[1], dtype)
    if dtype not in _FLOAT8:
        return e.op("Concat", past, new, axis=2)
    one = e.const(1.0, _FLOAT)
    values = [e.op("DequantizeLinear", codes, one, dtype=_FLOAT) for codes in (past, new)]
    joined = e.op("Concat", *values, axis=2)
    return e.op("QuantizeLinear", joined, one, dtype=dtype, output_dtype=int(dtype))


def _choose_block_qparams(e: Emitter, node: fx.Node) -> tuple[ir.Value, ...]:
    scale, zero = block_range(e, node)
    if zero is None:
        return scale, e.const(0, ir.DataType.INT8)  # read by nobody: these codes have no zero point
    return scale, e.cast(zero, ir.DataType.UINT8)


def is_of_blocks(scale: object) -> bool:
    """Whether a scale is one that blocks have of themselves."""
    if not isinstance(scale, fx.Node) or not is_op(scale, operator.getitem):
        return False
    chosen = scale.args[0]
    if isinstance(chosen, fx.Node) and is_op(chosen, _canonical.choose_qparams.default):
        return len(chosen.args) > 5
    return is_op(chosen, _canonical.choose_block_qparams.default)


def quantize_blocks(e: Emitter, node: fx.Node, code: ir.DataType) -> ir.Value:
    """QuantizeLinear with a scale per block, the division written out.

    ONNX Runtime (1.32) moves a QuantizeLinear ahead of a Transpose, and leaves a scale that has the shape of the data
    as it was; it does not move a division.
    """
    x_node, scale, zero_point, _, block = node.args[:5]
    assert isinstance(x_node, fx.Node)
    assert isinstance(block, int)
    last, one = e.const([-1]), e.const(1.0, _FLOAT)
    values = e.op("Div", blocks_of(e, x_node, block), e.op("Unsqueeze", e.value(scale, _FLOAT), last))
    if zero_point is not None:
        zero = e.op("Unsqueeze", e.cast(e.value(zero_point), _FLOAT), last)
        values = e.op("Add", e.op("Round", values), zero)
    *front, width = x_node.meta["shape"]
    flat = e.op("Reshape", values, e.const([*[0] * len(front), width]))
    return e.op("QuantizeLinear", flat, one, dtype=code, output_dtype=int(code))


# --- two codes in a byte ---------------------------------------------------------------------------------------------


def _pack_nibbles(e: Emitter, node: fx.Node) -> ir.Value:
    (codes_node,) = node.args
    assert isinstance(codes_node, fx.Node)
    *front, width = codes_node.meta["shape"]
    codes = e.value(codes_node)
    if dtype_of(codes) in (ir.DataType.INT4, ir.DataType.INT8):
        codes = e.op("Add", e.cast(codes, ir.DataType.INT32), e.const(8, ir.DataType.INT32))
    codes = e.cast(codes, ir.DataType.UINT8)
    pairs = e.op("Reshape", codes, e.const([*[0] * len(front), width // 2, 2]))
    low, high = (e.op("Gather", pairs, e.const(place), axis=-1) for place in (0, 1))
    return e.op("BitwiseOr", low, e.op("BitShift", high, e.const(4, ir.DataType.UINT8), direction="LEFT"))


def _unpack_nibbles(e: Emitter, node: fx.Node) -> ir.Value:
    packed_node, signed = node.args
    assert isinstance(packed_node, fx.Node)
    *front, width = packed_node.meta["shape"]
    packed = e.value(packed_node)
    last = e.const([-1])
    low = e.op("BitwiseAnd", packed, e.const(15, ir.DataType.UINT8))
    high = e.op("BitShift", packed, e.const(4, ir.DataType.UINT8), direction="RIGHT")
    pairs = e.op("Concat", e.op("Unsqueeze", low, last), e.op("Unsqueeze", high, last), axis=-1)
    codes = e.op("Reshape", pairs, e.const([*[0] * len(front), 2 * width]))
    if not signed:
        return codes
    shifted = e.op("Sub", e.cast(codes, ir.DataType.INT32), e.const(8, ir.DataType.INT32))
    return e.cast(shifted, ir.DataType.INT8)


# --- scales that several axes share ----------------------------------------------------------------------------------


def is_shared(scale: object) -> bool:
    """Whether a stored scale has the rank of the data and one element along some axes, which no ONNX operator takes."""
    shape = scale.meta.get("shape", ()) if isinstance(scale, fx.Node) and scale.op == "get_attr" else ()
    return len(shape) > 2 and 1 in shape


def quantize_shared(
    e: Emitter, x: ir.Value, scale: object, zero_point: object, code: ir.DataType, bits: int
) -> ir.Value:
    """QuantizeLinear, written out as far as the division; of integers, as a whole."""
    if code == ir.DataType.FLOAT8E4M3FN:
        units = e.op("Div", x, e.value(scale, dtype_of(x)))
        return e.op("QuantizeLinear", units, e.const(1.0, dtype_of(x)), dtype=code, output_dtype=int(code))
    is_signed = code in (ir.DataType.INT8, ir.DataType.INT4)
    low, high = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if is_signed else (0, (1 << bits) - 1)
    codes = e.op("Round", e.op("Div", x, e.value(scale, dtype_of(x))))
    if zero_point is not None:
        codes = e.op("Add", codes, e.value(zero_point, dtype_of(x)))
    limited = e.op("Clip", codes, e.const(float(low), dtype_of(x)), e.const(float(high), dtype_of(x)))
    return e.cast(limited, ir.DataType.INT8 if is_signed else ir.DataType.UINT8)


def dequantize_shared(e: Emitter, codes: ir.Value, scale: object, zero_point: object) -> ir.Value:
    """DequantizeLinear, written out."""
    is_float = dtype_of(codes) == ir.DataType.FLOAT8E4M3FN
    one = e.const(1.0, e.working)
    values = e.op("DequantizeLinear", codes, one, dtype=e.working) if is_float else e.cast(codes, e.working)
    if zero_point is not None:
        values = e.op("Sub", values, e.value(zero_point, e.working))
    return e.op("Mul", values, e.value(scale, e.working))


CACHE_BUILDERS: Builders = {
    _canonical.kv_append.default: _kv_append,
    _canonical.choose_block_qparams.default: _choose_block_qparams,
    _canonical.pack_nibbles.default: _pack_nibbles,
    _canonical.unpack_nibbles.default: _unpack_nibbles,
}
