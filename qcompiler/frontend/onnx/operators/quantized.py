"""Operators on codes that are computed at run time. Weights with codes are read in `qcompiler.frontend.onnx.layers`.

Source: onnx/docs/Operators.md.
"""

import torch
from torch import Tensor

from qcompiler.frontend.onnx.call import Call, Operators
from qcompiler.frontend.onnx.values import DTYPES, Unsupported, Value

__all__ = ["CONTRIB_QUANTIZED", "QUANTIZED"]

_NARROW = {21: 4, 22: 4}
_CODES = (torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2, torch.int32)


def _scales(call: Call, x: Tensor) -> tuple[Tensor, Tensor | None, int, int]:
    """Scale, zero point, axis and block as `qcompiler.ir.ops` takes them."""
    scale, zero, block = call.tensor(1), call.optional_tensor(2), call.get("block_size", 0)
    axis = call.get("axis", 1)
    if scale.numel() == 1 and not block:
        axis, scale, zero = 0, scale.reshape([]), None if zero is None else zero.reshape([])
    elif scale.dim() != 1 and not block:
        raise Unsupported("a scale of several dimensions without blocks")
    if zero is not None and zero.dtype not in _CODES:
        raise Unsupported(f"codes of {str(zero.dtype).removeprefix('torch.')}")
    return scale, zero, axis, block


def _quantize(call: Call) -> Value:
    x = call.tensor(0)
    scale, zero, axis, block = _scales(call, x)
    given = call.get("output_dtype", 0)
    if given not in (0, 2, 3, 17, 19, *_NARROW):
        raise Unsupported(f"codes of type {given}")
    dtype = DTYPES.get(given, torch.uint8) if zero is None else zero.dtype
    bits = (_NARROW[given],) if given in _NARROW else ()
    return torch.ops.qcompiler.quantize(x, scale, zero, axis, block, dtype, *bits)  # type: ignore[no-any-return]


def _dequantize(call: Call) -> Value:
    codes = call.tensor(0)
    scale, zero, axis, block = _scales(call, codes)
    if codes.dtype == torch.int32:
        zero = None
    return torch.ops.qcompiler.dequantize(codes, scale, zero, axis, block, torch.float32)  # type: ignore[no-any-return]


def _dynamic(call: Call) -> tuple[Value | None, ...]:
    x = call.tensor(0)
    scale, zero = torch.ops.qcompiler.choose_qparams(x, torch.uint8, None)
    return torch.ops.qcompiler.quantize(x, scale, zero, 0, 0, torch.uint8), scale, zero


def _integer_product(call: Call) -> Value:
    """MatMulInteger, in float32: exact up to 24 bits of the sums."""
    a, b = call.tensor(0).float(), call.tensor(1).float()
    zero_a, zero_b = call.optional_tensor(2), call.optional_tensor(3)
    a = a if zero_a is None else a - (zero_a.float().unsqueeze(-1) if zero_a.dim() else zero_a.float())
    b = b if zero_b is None else b - zero_b.float()
    return torch.matmul(a, b).to(torch.int32)


QUANTIZED: Operators = {
    "QuantizeLinear": _quantize,
    "DequantizeLinear": _dequantize,
    "DynamicQuantizeLinear": _dynamic,
    "MatMulInteger": _integer_product,
}
CONTRIB_QUANTIZED: Operators = {"QuantizeLinear": _quantize, "DequantizeLinear": _dequantize}
