"""ONNX's names of dtypes."""

import onnx_ir as ir
import torch

from qcompiler.errors import TargetError

__all__ = ["DTYPES", "FLOATS", "TORCH", "dtype_of", "onnx_dtype"]

FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)

DTYPES = {
    torch.float64: ir.DataType.DOUBLE,
    torch.float32: ir.DataType.FLOAT,
    torch.float16: ir.DataType.FLOAT,  # floats narrower than float32 are computed in the graph's float type
    torch.bfloat16: ir.DataType.FLOAT,
    torch.int64: ir.DataType.INT64,
    torch.int32: ir.DataType.INT32,
    torch.int16: ir.DataType.INT16,
    torch.int8: ir.DataType.INT8,
    torch.uint8: ir.DataType.UINT8,
    torch.bool: ir.DataType.BOOL,
    torch.float8_e4m3fn: ir.DataType.FLOAT8E4M3FN,
    torch.float8_e5m2: ir.DataType.FLOAT8E5M2,
}
TORCH = {
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.BFLOAT16: torch.bfloat16,
    ir.DataType.DOUBLE: torch.float64,
    ir.DataType.INT64: torch.int64,
    ir.DataType.INT32: torch.int32,
    ir.DataType.INT16: torch.int16,
    ir.DataType.INT8: torch.int8,
    ir.DataType.UINT8: torch.uint8,
    ir.DataType.BOOL: torch.bool,
}


def onnx_dtype(dtype: torch.dtype) -> ir.DataType:
    """The ONNX dtype a torch dtype is computed in.

    Raises:
        TargetError: for a dtype without one.
    """
    if dtype not in DTYPES:
        raise TargetError("no ONNX dtype for this torch dtype", got=dtype)
    return DTYPES[dtype]


def dtype_of(value: ir.Value) -> ir.DataType:
    """The dtype of an emitted value."""
    assert value.dtype is not None, value
    return value.dtype
