"""Rules of QuantizeLinear and DequantizeLinear, wherever they stand."""

import numpy as np
import onnx_ir as ir

from qcompiler.lowering.tensorrt.legality.model import constant_of, is_constant
from qcompiler.lowering.tensorrt.legality.operands import dtype_of, granularity, shape_of
from qcompiler.lowering.tensorrt.legality.rule import Rule

__all__ = ["QUANTIZER_RULES"]

_BUILDER = "seen with tensorrt_rtx 1.7.1.116"
_T = ir.DataType
_FLOATS = (_T.FLOAT, _T.FLOAT16, _T.BFLOAT16)
_CODES = (_T.INT8, _T.INT4, _T.FLOAT8E4M3FN, _T.FLOAT4E2M1)
_QUANTIZE, _DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"


def _is_quantizer(node: ir.Node) -> bool:
    return node.op_type in (_QUANTIZE, _DEQUANTIZE) and len(node.inputs) > 1


def _codes(node: ir.Node) -> ir.DataType | None:
    return dtype_of(node.outputs[0] if node.op_type == _QUANTIZE else node.inputs[0])


def _zero_point(node: ir.Node) -> ir.Value | None:
    return node.inputs[2] if len(node.inputs) > 2 else None


def _type_of_data(node: ir.Node, _: int) -> str | None:
    if not _is_quantizer(node):
        return None
    dtype = dtype_of(node.inputs[0])
    taken = _FLOATS if node.op_type == _QUANTIZE else (*_CODES, _T.UINT8)  # UINT8 has a rule of its own
    return None if dtype is None or dtype in taken else f"{node.op_type} of {dtype.name}"


def _type_of_codes(node: ir.Node, _: int) -> str | None:
    if node.op_type != _QUANTIZE or not _is_quantizer(node):
        return None
    dtype = _T(node.attributes.get_int("output_dtype", 0))
    return None if dtype in (_T.UNDEFINED, *_CODES) else f"QuantizeLinear to {dtype.name}"


def _codes_by_default(node: ir.Node, _: int) -> str | None:
    if node.op_type != _QUANTIZE or not _is_quantizer(node) or "output_dtype" in node.attributes:
        return None
    zero = _zero_point(node)
    if zero is None:
        return "neither a zero point nor output_dtype"
    return "a zero point of type UINT8" if dtype_of(zero) == _T.UINT8 else None


def _zero_point_value(node: ir.Node, _: int) -> str | None:
    values = constant_of(_zero_point(node)) if _is_quantizer(node) and _codes(node) != _T.FLOAT8E4M3FN else None
    if values is None or not np.any(values.astype(np.float32)):
        return None
    return f"a zero point other than 0, of {'weights' if is_constant(node.inputs[0]) else 'activations'}"


def _zero_point_of_float(node: ir.Node, _: int) -> str | None:
    values = constant_of(_zero_point(node)) if _is_quantizer(node) and _codes(node) == _T.FLOAT8E4M3FN else None
    return "a zero point other than 0" if values is not None and np.any(values.astype(np.float32)) else None


def _zero_point_at_run_time(node: ir.Node, _: int) -> str | None:
    zero = _zero_point(node) if _is_quantizer(node) else None
    return None if zero is None or is_constant(zero) else "a zero point computed at run time"


def _scale_sign(node: ir.Node, _: int) -> str | None:
    if not _is_quantizer(node) or _codes(node) == _T.INT4 or not is_constant(node.inputs[1]):
        return None
    values = constant_of(node.inputs[1])
    if values is None or bool((values.astype(np.float32) > 0).all()):
        return None
    return "a scale of 0" if bool((values.astype(np.float32) >= 0).all()) else "a negative scale"


def _scale_type(node: ir.Node, _: int) -> str | None:
    dtype = dtype_of(node.inputs[1]) if _is_quantizer(node) else None
    return None if dtype is None or dtype in _FLOATS else f"scales of {dtype.name}"


def _blocks(node: ir.Node, _: int) -> str | None:
    if not _is_quantizer(node):
        return None
    found = granularity(node)
    if found.kind != "block" or found.is_whole:
        return None
    return f"scales {list(shape_of(node.inputs[1]) or ())} for data {list(shape_of(node.inputs[0]) or ())}"


def _channel_count(node: ir.Node, _: int) -> str | None:
    if not _is_quantizer(node):
        return None
    data, scale = shape_of(node.inputs[0]), shape_of(node.inputs[1])
    found = granularity(node)
    if found.kind != "channel" or data is None or scale is None:
        return None
    size = data[found.axis]
    differ = isinstance(size, int) and isinstance(scale[0], int) and size != scale[0]
    return f"{scale[0]} scales for {size} channels of axis {found.axis}" if differ else None


def _output_type(node: ir.Node, _: int) -> str | None:
    """Refused for INT4 and FP4 always, for FP8 where scales are of 16 bits."""
    differ = _outputs_other_type(node)
    if differ is None:
        return None
    codes, scale = _codes(node), dtype_of(node.inputs[1])
    refused = codes in (_T.INT4, _T.FLOAT4E2M1) or (codes == _T.FLOAT8E4M3FN and scale != _T.FLOAT)
    return differ if refused else None


def _outputs_other_type(node: ir.Node) -> str | None:
    if node.op_type != _DEQUANTIZE or not _is_quantizer(node):
        return None
    scale, out = dtype_of(node.inputs[1]), dtype_of(node.outputs[0])
    if scale is None or out is None or scale == out or scale not in _FLOATS:
        return None
    return f"scales of {scale.name} and an output of {out.name}"


QUANTIZER_RULES: tuple[Rule[ir.Node], ...] = (
    Rule(
        "quantizer-data",
        "refused",
        _type_of_data,
        "codes are made of FLOAT, FLOAT16 or BFLOAT16 alone, and floats of INT8, INT4, FP8 or FP4 codes alone",
        "Cast and Mul for anything else; keep a bias in float",
        f"{_BUILDER}: 'input has type Int32 but must have type ...'",
    ),
    Rule(
        "quantizer-codes",
        "refused",
        _type_of_codes,
        "QuantizeLinear makes INT8, INT4, FP8 or FP4 codes alone",
        "symmetric codes of one of these types",
        f"{_BUILDER}: 'TensorRT only allows FP8, INT8, INT4, and FP4'",
    ),
    Rule(
        "unsigned-by-default",
        "wrong",
        _codes_by_default,
        "ONNX makes UINT8 codes here, TensorRT INT8 ones: it clips at -128 where ONNX clips at 0",
        "output_dtype=INT8, or a zero point of type INT8 and value 0",
        f"{_BUILDER}; ONNX, QuantizeLinear-21",
    ),
    Rule(
        "zero-point",
        "refused",
        _zero_point_value,
        "quantization is symmetric",
        "activations: Q(x + (zero point - 128)·scale) symmetric, and a constant off behind the product; INT4 weights: "
        "x·DQ(w) - (sums of x over blocks)·(scale·zero point)",
        f"{_BUILDER}: 'Non-zero zero point is not supported'",
    ),
    Rule(
        "zero-point-of-fp8",
        "wrong",
        _zero_point_of_float,
        "the zero point of FP8 codes is not read",
        "a zero point of 0",
        f"{_BUILDER}; ONNX, QuantizeLinear-21: it must be 0",
    ),
    Rule(
        "zero-point-at-run-time",
        "refused",
        _zero_point_at_run_time,
        "a zero point must be an initializer",
        "symmetric codes without a zero point",
        f"{_BUILDER}: 'has `zero_point` which is not an initializer'",
    ),
    Rule(
        "scale-sign",
        "refused",
        _scale_sign,
        "scales must be above 0",
        "turn the signs of the codes, not of the scale; give channels of zeros a small positive scale",
        f"{_BUILDER}: 'Scale coefficients must all be positive'",
    ),
    Rule(
        "scale-type",
        "refused",
        _scale_type,
        "scales are FLOAT, FLOAT16 or BFLOAT16",
        "scales of FP8 through a DequantizeLinear of their own; powers of two (E8M0) as floats, or TRT_MXFP8...",
        f"{_BUILDER}; NvInfer.h, IDequantizeLayer",
    ),
    Rule(
        "blocks",
        "refused",
        _blocks,
        "blocks lie along one axis and fill it: no last one is smaller, and a block is more than one element",
        "a block size that divides the axis, or padding",
        f"{_BUILDER}: 'The quantization axis must divide into whole blocks', 'Only a single blocking dimension'",
    ),
    Rule(
        "channel-count",
        "refused",
        _channel_count,
        "one scale for each channel of the axis",
        "set axis (1 by default) to that of the channels",
        f"{_BUILDER}; onnx-tensorrt",
    ),
    Rule(
        "output-type",
        "refused",
        _output_type,
        "DequantizeLinear gives floats of the scale's type",
        "scales of the type that is multiplied in, and no output_dtype",
        f"{_BUILDER}: 'Could not infer output types for operation'",
    ),
)
