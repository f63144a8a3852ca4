"""Rounded activations and caches: every QuantizeLinear and DequantizeLinear has a constant scale, mostly one.

TensorRT takes constant scales only, one for all of an activation, and symmetric signed codes. So what is measured as
the model runs divides ahead of a QuantizeLinear with scale 1, and multiplies behind a DequantizeLinear with scale 1;
bytes without a sign enter and leave as INT8, 128 less, and pairs of 4-bit codes as INT4, 8 less where unsigned.
"""

from dataclasses import dataclass

import onnx_ir as ir
import torch
from torch import fx

from qcompiler.ir import Graph, is_op, quantized_value
from qcompiler.lowering.onnx.builders.ranges import block_range, blocks_of, dynamic_range
from qcompiler.lowering.onnx.dtypes import dtype_of, onnx_dtype
from qcompiler.lowering.onnx.emitter import Builders, Emitter, argument
from qcompiler.lowering.tensorrt.dialect.tables import is_table, rows_of_table

__all__ = ["ACTIVATION_BUILDERS", "Rounding", "codes_of", "packed_ports", "rounding_of", "zero_of"]

_canonical = torch.ops.qcompiler
_FLOAT, _INT4, _INT8 = ir.DataType.FLOAT, ir.DataType.INT4, ir.DataType.INT8
_CODES = (_INT4, ir.DataType.FLOAT8E4M3FN)


@dataclass(frozen=True)
class Rounding:
    """How the value that a ``dequantize`` node gives was rounded.

    Attributes:
        source: what was rounded.
        scale, zero_point: nodes; stored, or measured.
        block: channels of the last axis that share a scale; 0: one per token or for everything.
        dtype: torch's of the codes.
        bits: of a code.
    """

    source: fx.Node
    scale: fx.Node
    zero_point: fx.Node | None
    block: int
    dtype: torch.dtype
    bits: int

    @property
    def is_float8(self) -> bool:
        """Whether the codes are 8-bit floats."""
        return self.dtype.is_floating_point

    @property
    def is_static(self) -> bool:
        """Whether one stored scale serves all values."""
        return self.scale.op == "get_attr"


def rounding_of(node: object) -> Rounding | None:
    """The rounding behind a node; None where it gives no rounded value."""
    source = quantized_value(node)
    if source is None or not is_op(node, _canonical.dequantize.default):
        return None
    assert isinstance(node, fx.Node)
    codes = node.args[0]
    assert isinstance(codes, fx.Node)
    if not is_op(codes, _canonical.quantize.default):
        return None
    _, scale, zero_point, _, _, dtype = codes.args[:6]
    assert isinstance(scale, fx.Node)
    assert isinstance(dtype, torch.dtype)
    bits = argument(codes, 6, "bits") or 8
    return Rounding(source, scale, zero_point, _block(codes), dtype, bits)  # type: ignore[arg-type]


def _block(node: fx.Node) -> int:
    """How many channels share a scale; 0 where a scale as it is broadcasts over all of them."""
    block = node.args[4]
    assert isinstance(block, int)
    width = node.meta["shape"][-1]
    return block if not isinstance(width, int) or block < width else 0


def codes_of(e: Emitter, values: ir.Value, dtype: torch.dtype, bits: int) -> ir.Value:
    """Codes of float32 values that the scale was taken out of, and that have no zero point."""
    one = e.const(1.0, _FLOAT)
    code = onnx_dtype(dtype) if dtype.is_floating_point else _INT4 if bits == 4 else _INT8
    if not dtype.is_floating_point and bits not in (4, 8):
        limit = float(1 << (bits - 1))
        values = e.op("Clip", e.op("Round", values), e.const(-limit, _FLOAT), e.const(limit - 1, _FLOAT))
    return e.op("QuantizeLinear", values, one, dtype=code, output_dtype=int(code))


# --- nodes of their own: caches --------------------------------------------------------------------------------------


def _quantize(e: Emitter, node: fx.Node) -> ir.Value:
    x_node, scale, zero_point, _, _, dtype = node.args[:6]
    assert isinstance(x_node, fx.Node)
    assert isinstance(scale, fx.Node)
    block = _block(node)
    assert isinstance(dtype, torch.dtype)
    bits = argument(node, 6, "bits") or 8
    if scale.op == "get_attr" and not scale.meta.get("shape") and dtype != torch.uint8 and bits == 8:
        x = e.cast(e.value(x_node, e.float_like(x_node)), _FLOAT)
        code = onnx_dtype(dtype)
        return e.op("QuantizeLinear", x, e.value(scale, _FLOAT), dtype=code, output_dtype=int(code))
    wide, scales = _beside(e, x_node, scale, block)
    values = e.op("Div", wide, scales)
    if dtype == torch.uint8:
        zero = e.const(0.0, _FLOAT) if zero_point is None else _zero(e, zero_point, block)
        shifted = e.op("Sub", zero, e.const(float(1 << (bits - 1)), _FLOAT))
        values = e.op("Add", e.op("Round", values), shifted)
    if block:
        *front, width = x_node.meta["shape"]
        values = e.op("Reshape", values, e.const([*[0] * len(front), width]))
    return codes_of(e, values, dtype, bits)


def _beside(e: Emitter, x_node: fx.Node, scale: fx.Node, block: int) -> tuple[ir.Value, ir.Value]:
    """A value in float32, cut into blocks where scales are theirs, and scales that broadcast over it."""
    if block:
        return blocks_of(e, x_node, block), e.op("Unsqueeze", e.value(scale, _FLOAT), e.const([-1]))
    return e.cast(e.value(x_node, e.float_like(x_node)), _FLOAT), e.value(scale, _FLOAT)


def zero_of(e: Emitter, zero_point: fx.Node) -> ir.Value:
    """A zero point of unsigned codes as float32: stored as it is, or measured and kept 128 less."""
    if zero_point.op == "get_attr":
        return e.cast(e.value(zero_point), _FLOAT)
    kept = e.op("DequantizeLinear", e.value(zero_point), e.const(1.0, _FLOAT), dtype=_FLOAT)
    return e.op("Add", kept, e.const(128.0, _FLOAT))


def _zero(e: Emitter, zero_point: object, block: int) -> ir.Value:
    """A zero point that broadcasts over values, or over their blocks."""
    assert isinstance(zero_point, fx.Node)
    value = zero_of(e, zero_point)
    return e.op("Unsqueeze", value, e.const([-1])) if block else value


def _dequantize(e: Emitter, node: fx.Node) -> ir.Value:
    codes_node, scale, zero_point = node.args[:3]
    assert isinstance(codes_node, fx.Node)
    assert isinstance(scale, fx.Node)
    block = _block(node)
    if is_table(node):
        return rows_of_table(e, node)
    if codes_node.op == "get_attr":
        from qcompiler.lowering.tensorrt.dialect.weights import stored_weight

        return stored_weight(e, node, e.working)
    codes = e.value(codes_node)
    is_unsigned = codes_node.meta["dtype"] == torch.uint8
    if scale.op == "get_attr" and not scale.meta.get("shape") and not is_unsigned:
        return e.op("DequantizeLinear", codes, e.value(scale, e.working), dtype=e.working)
    values = e.op("DequantizeLinear", codes, e.const(1.0, e.working), dtype=e.working)
    *front, width = codes_node.meta["shape"]
    if block:
        values = e.op("Reshape", values, e.const([*[0] * len(front), width // block, block]))
    if is_unsigned:
        shift = 8.0 if dtype_of(codes) == _INT4 else 128.0
        zero = e.const(0.0, _FLOAT) if zero_point is None else _zero(e, zero_point, block)
        values = e.op("Sub", values, e.cast(e.op("Sub", zero, e.const(shift, _FLOAT)), e.working))
    scales = e.value(scale, e.working)
    values = e.op("Mul", values, e.op("Unsqueeze", scales, e.const([-1])) if block else scales)
    return e.op("Reshape", values, e.const([*[0] * len(front), width])) if block else values


def _kept_zero(e: Emitter, zero: ir.Value | None) -> ir.Value:
    """A measured zero point as INT8, 128 less: caches keep it."""
    if zero is None:
        return e.const(0, _INT8)  # read by nobody
    return codes_of(e, e.op("Sub", zero, e.const(128.0, _FLOAT)), torch.int8, 8)


def _choose_qparams(e: Emitter, node: fx.Node) -> tuple[ir.Value, ...]:
    scale, zero = dynamic_range(e, node)
    return scale, _kept_zero(e, zero)


def _choose_block_qparams(e: Emitter, node: fx.Node) -> tuple[ir.Value, ...]:
    scale, zero = block_range(e, node)
    return scale, _kept_zero(e, zero)


def _same(e: Emitter, node: fx.Node) -> ir.Value:
    """Codes of four bits are INT4 already."""
    return e.value(node.args[0])


def _kv_append(e: Emitter, node: fx.Node) -> ir.Value:
    """Concat; of codes that it does not take, as numbers in between: scales of 1 change no code."""
    past = e.value(node.args[0])
    dtype = dtype_of(past)
    new = e.value(node.args[1])
    if dtype not in _CODES:
        return e.op("Concat", past, e.cast(new, dtype), axis=2)
    one = e.const(1.0, e.working)
    joined = e.op("Concat", *(e.op("DequantizeLinear", codes, one, dtype=e.working) for codes in (past, new)), axis=2)
    return e.op("QuantizeLinear", joined, one, dtype=dtype, output_dtype=int(dtype))


def packed_ports(graph: Graph) -> dict[str, tuple[ir.DataType, tuple[int | str, ...]]]:
    """How ports are declared whose own dtype engines have not: pairs of codes as INT4, unsigned bytes as INT8."""
    found: dict[str, tuple[ir.DataType, tuple[int | str, ...]]] = {}
    for node, port in zip(graph.inputs, graph.signature.inputs, strict=True):
        if port.dtype not in ("uint8", "int8") or port.role != "past":
            continue
        appended = [user for user in node.users if is_op(user, _canonical.kv_append.default)]
        readers = {user for each in appended for user in each.users}
        is_packed = any(is_op(user, _canonical.unpack_nibbles.default) for user in readers)
        *front, width = port.shape
        assert isinstance(width, int)
        declared = (_INT4, (*front, 2 * width)) if is_packed else (_INT8, port.shape)
        found[port.name] = declared
        present = port.name.replace("past_key_values.", "present.", 1)
        (shape,) = (other.shape for other in graph.signature.outputs if other.name == present)
        found[present] = (declared[0], (*shape[:-1], declared[1][-1]))
    return found


ACTIVATION_BUILDERS: Builders = {
    _canonical.quantize.default: _quantize,
    _canonical.dequantize.default: _dequantize,
    _canonical.choose_qparams.default: _choose_qparams,
    _canonical.choose_block_qparams.default: _choose_block_qparams,
    _canonical.kv_append.default: _kv_append,
    _canonical.pack_nibbles.default: _same,
    _canonical.unpack_nibbles.default: _same,
}
