"""Rules of types: of inputs, outputs, constants, and of what nodes make."""

import onnx_ir as ir

from qcompiler.lowering.tensorrt.legality.operands import dtype_of, shape_of
from qcompiler.lowering.tensorrt.legality.rule import Rule

__all__ = ["VALUE_RULES"]

_BUILDER = "seen with tensorrt_rtx 1.7.1.116"
_T = ir.DataType
_KNOWN = (
    *(_T.FLOAT, _T.FLOAT16, _T.BFLOAT16, _T.DOUBLE),
    *(_T.INT32, _T.INT64, _T.INT8, _T.INT4, _T.UINT8, _T.BOOL),
    *(_T.FLOAT8E4M3FN, _T.FLOAT4E2M1),
)
_LEAST = {_T.INT4: 80, _T.BFLOAT16: 80, _T.FLOAT8E4M3FN: 89, _T.FLOAT4E2M1: 120}
_READS_UINT8 = ("Cast", "Identity")
_QUANTIZERS = ("QuantizeLinear", "DequantizeLinear")
_MOST_RANK = 8
_PACKED = (_T.INT4, _T.FLOAT8E4M3FN, _T.FLOAT4E2M1)
_MOVES = ("Concat", "Flatten", "Identity", "Reshape", "Transpose")
_MAKES_CODES = ("QuantizeLinear", "Constant", *_MOVES)
_TAKES_CODES = ("DequantizeLinear", "Shape", "Size", *_MOVES)


def _unknown_type(value: ir.Value, _: int) -> str | None:
    dtype = dtype_of(value)
    scale = dtype == _T.FLOAT8E8M0 and all(node.op_type.startswith("TRT_MXFP8") for node, _ in value.uses())
    return None if dtype is None or dtype in _KNOWN or scale else f"{dtype.name} at {_what(value)}"


def _capability(value: ir.Value, sm: int) -> str | None:
    dtype = dtype_of(value)
    least = 0 if dtype is None else _LEAST.get(dtype, 0)
    return f"{dtype.name} on SM {sm}, below {least}" if dtype is not None and sm < least else None


def _uint8(value: ir.Value, _: int) -> str | None:
    maker = value.producer()
    if dtype_of(value) != _T.UINT8 or (maker is not None and maker.op_type in _QUANTIZERS):
        return None  # what QuantizeLinear makes without being told, the parser takes for INT8: a rule of its own
    if maker is not None and maker.op_type not in ("Identity", "Constant"):
        return f"UINT8 made by {maker.op_type}"
    others = [
        node.op_type
        for node, place in value.uses()
        if node.op_type not in _READS_UINT8 and not (node.op_type in _QUANTIZERS and place == 2)
    ]
    return f"UINT8 read by {others[0]}" if others else None


def _constant_codes(value: ir.Value, _: int) -> str | None:
    maker = value.producer()
    is_stored = value.const_value is not None or (maker is not None and maker.op_type == "Constant")
    dtype = dtype_of(value)
    if not is_stored or dtype is None or dtype not in (_T.INT8, *_PACKED):
        return None
    others = [
        node.op_type
        for node, place in value.uses()
        if not node.op_type.startswith("TRT_")
        and node.op_type != "DequantizeLinear"
        and not (node.op_type == "QuantizeLinear" and place == 2)
    ]
    return f"a constant of {dtype.name} read by {others[0]}" if others else None


def _codes_between(value: ir.Value, _: int) -> str | None:
    dtype = dtype_of(value)
    if dtype is None or dtype not in _PACKED or value.const_value is not None:
        return None
    maker = value.producer()
    if maker is not None and maker.op_type not in _MAKES_CODES and not maker.op_type.startswith("TRT_"):
        return f"{dtype.name} made by {maker.op_type}"
    others = [
        node.op_type
        for node, place in value.uses()
        if node.op_type not in _TAKES_CODES and not node.op_type.startswith("TRT_") and place != 2
    ]
    return f"{dtype.name} read by {others[0]}" if others else None


def _rank(value: ir.Value, _: int) -> str | None:
    shape = shape_of(value)
    return None if shape is None or len(shape) <= _MOST_RANK else f"{len(shape)} dimensions at {_what(value)}"


def _odd_count(value: ir.Value, _: int) -> str | None:
    shape, dtype = shape_of(value), dtype_of(value)
    if shape is None or dtype not in (_T.INT4, _T.FLOAT4E2M1) or value.const_value is None:
        return None
    if all(node.op_type in _QUANTIZERS and place == 2 for node, place in value.uses()):
        return None  # a zero point, of which only the values are read
    count = 1
    for size in shape:
        count *= size if isinstance(size, int) else 1
    return f"{count} elements of {dtype.name}" if count % 2 else None


def _what(value: ir.Value) -> str:
    if value.is_graph_input():
        return "an input"
    return "a constant" if value.const_value is not None else "a value between nodes"


VALUE_RULES: tuple[Rule[ir.Value], ...] = (
    Rule(
        "unknown-type",
        "refused",
        _unknown_type,
        "TensorRT has no tensors of this type",
        "codes as INT8, INT4, FLOAT8E4M3FN or FLOAT4E2M1; numbers as INT32 or INT64",
        f"{_BUILDER}; NvInfer.h, DataType",
    ),
    Rule(
        "compute-capability",
        "refused",
        _capability,
        "the GPU has no arithmetic for this type, and the builder refuses it",
        "ask for a newer compute capability, or for another recipe",
        f"{_BUILDER}: 'Cannot compile for target(s) ..., because the model contains HW-specific datatypes'",
    ),
    Rule(
        "uint8",
        "refused",
        _uint8,
        "UINT8 may only enter the engine and be cast",
        "symmetric INT8 codes without a zero point",
        f"{_BUILDER}: 'TensorRT does not support UINT8 types for intermediate tensors'",
    ),
    Rule(
        "constant-codes",
        "refused",
        _constant_codes,
        "constants of codes go straight into DequantizeLinear",
        "turn or cut the weights when they are written, or behind DequantizeLinear; INT32 for numbers",
        f"{_BUILDER}: 'Quantized constant is only allowed before DQ'",
    ),
    Rule(
        "codes-between",
        "refused",
        _codes_between,
        "INT4, FP8 and FP4 codes are made by QuantizeLinear, and only concatenated, reshaped or transposed ahead of "
        "DequantizeLinear",
        "QuantizeLinear and DequantizeLinear with a scale of 1 in the place of Cast; anything else on floats",
        f"{_BUILDER}: 'is not consumed by ... IDequantizeLayer, IConcatenationLayer, IShuffleLayer'",
    ),
    Rule(
        "rank",
        "refused",
        _rank,
        "tensors have at most 8 dimensions",
        "merge some of them with a Reshape",
        f"{_BUILDER}; NvInfer.h, Dims::MAX_DIMS",
    ),
    Rule(
        "odd-count",
        "refused",
        _odd_count,
        "two codes share a byte, and constants must fill theirs",
        "pad a dimension to an even size",
        f"{_BUILDER}; NvInfer.h, IDequantizeLayer",
    ),
)
