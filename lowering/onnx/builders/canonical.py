"""Canonical operators (`qcompiler.ir.ops`) as standard ONNX operators of opset 21."""

import math
import operator
from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from qcompiler.errors import TargetError
from qcompiler.ir import (
    Graph,
    is_op,
    is_quantized_weight,
    quantized_value,
    site_name,
    stored_names,
)
from qcompiler.lowering.onnx.builders.attention import attend
from qcompiler.lowering.onnx.builders.caches import (
    dequantize_shared,
    is_of_blocks,
    is_shared,
    quantize_blocks,
    quantize_shared,
)
from qcompiler.lowering.onnx.builders.ranges import dynamic_range
from qcompiler.lowering.onnx.dtypes import dtype_of, onnx_dtype
from qcompiler.lowering.onnx.emitter import Builders, Emitter, argument, tensor_arguments
from qcompiler.numerics import factors_of, hadamard_matrix

__all__ = [
    "CANONICAL_BUILDERS",
    "code_dtype",
    "is_linear_weight",
    "layer_norm",
    "matmul_weight",
    "rotary",
    "site_of",
    "weight_code_dtype",
]

_canonical = torch.ops.qcompiler
_FLOAT = ir.DataType.FLOAT
_CODES = {
    ("int2", 25): ir.DataType.INT2,
    ("uint2", 25): ir.DataType.UINT2,
    ("int2", 21): ir.DataType.INT4,
    ("uint2", 21): ir.DataType.UINT4,
    ("int3", 21): ir.DataType.INT4,
    ("uint3", 21): ir.DataType.UINT4,
    ("int4", 21): ir.DataType.INT4,
    ("uint4", 21): ir.DataType.UINT4,
    ("int8", 21): ir.DataType.INT8,
    ("uint8", 21): ir.DataType.UINT8,
    ("float8_e4m3fn", 21): ir.DataType.FLOAT8E4M3FN,
    ("float8_e5m2", 21): ir.DataType.FLOAT8E5M2,
}
_NARROW = {(torch.int8, 4): ir.DataType.INT4, (torch.uint8, 4): ir.DataType.UINT4}


# --- linear and its weights ------------------------------------------------------------------------------------------


def code_dtype(stored: str, opset: int) -> ir.DataType:
    """The ONNX dtype that holds stored codes; those narrower than any the operator set has are widened, exactly."""
    found = _CODES.get((stored, 25)) if opset >= 25 else None
    found = found or _CODES.get((stored, 21))
    if found is None:
        raise TargetError(
            "no ONNX dtype for these codes", got=stored, expected=", ".join(sorted({k for k, _ in _CODES}))
        )
    return found


def weight_code_dtype(node: fx.Node, graph: Graph, opset: int, *, unsigned: bool) -> ir.DataType:
    """The ONNX dtype that holds the codes of a linear layer's weight, by its ``dequantize`` node.

    Where ONNX Runtime makes an integer product of int8 codes and codes of activations, ``unsigned`` turns the weight's
    into uint8 with zero point 128, which is the same: its product of signed weights adds pairs in 16 bits on x86
    processors without VNNI, and saturates (seen in 1.32 on AVX2: off by 3 % of the largest result).
    """
    codes = node.args[0]
    assert isinstance(codes, fx.Node)
    stored = code_dtype(graph.weights.info(str(codes.target)).dtype, opset)
    is_exact = not unsigned or stored != ir.DataType.INT8 or node.args[4] != 0
    return stored if is_exact or not any(map(_reads_codes, node.users)) else ir.DataType.UINT8


def _reads_codes(linear: fx.Node) -> bool:
    """Whether the input of a linear layer is rounded to 8-bit integers with one scale for the whole tensor."""
    rounded = linear.args[0]
    if quantized_value(rounded) is None:
        return False
    assert isinstance(rounded, fx.Node)
    codes, scale = rounded.args[:2]
    assert isinstance(codes, fx.Node)
    assert isinstance(scale, fx.Node)
    return codes.meta.get("dtype") in (torch.int8, torch.uint8) and not scale.meta.get("shape")


def is_linear_weight(node: fx.Node) -> bool:
    """Whether a ``dequantize`` node of stored codes feeds linear layers only, as their weight."""
    codes = node.args[0] if node.args else None
    return (
        is_op(node, _canonical.dequantize.default)
        and isinstance(codes, fx.Node)
        and codes.op == "get_attr"
        and all(is_op(user, _canonical.linear.default) and user.args[1] is node for user in node.users)
    )


def matmul_weight(e: Emitter, node: fx.Node, dtype: ir.DataType) -> ir.Value:
    """A linear layer's weight ``[out, in]`` as MatMul's second input ``[in, out]``.

    Codes and float weights are stored transposed; a float weight that is read elsewhere too (a tied embedding) is
    stored once, as it is, and a Transpose that ONNX Runtime folds or fuses stands in between.
    """
    if node.op == "get_attr":
        if len(e.uses[e.weight_name(node)] - {"linear"}):
            return e.op("Transpose", e.weight(node, dtype), perm=[1, 0])
        return e.weight(node, dtype, transpose=True)
    if not is_linear_weight(node):
        return e.op("Transpose", e.value(node, dtype), perm=[1, 0])
    codes, scale, zero_point, axis, block = _dequantize_arguments(node)
    width, side = e.graph.weights.info(str(codes.target)).shape[1], block
    if block >= width:  # one block per row: the same as one scale per channel
        axis, block = 0, 0
    places = {"axis": axis, "block": block, "side": side}
    stored = weight_code_dtype(node, e.graph, e.opset, unsigned=e.unsigned_products)
    return _stored_dequantize(e, codes, scale, zero_point, **places, stored=stored, dtype=dtype, transpose=True)


def _dequantize_arguments(node: fx.Node) -> tuple[fx.Node, Any, Any, int, int]:
    codes, scale, zero_point, axis, block = node.args[:5]
    assert isinstance(codes, fx.Node)
    assert isinstance(axis, int)
    assert isinstance(block, int)
    return codes, scale, zero_point, axis, block


def _stored_dequantize(
    e: Emitter,
    codes: fx.Node,
    scale: fx.Node,
    zero_point: fx.Node | None,
    *,
    axis: int,
    block: int,
    side: int,
    stored: ir.DataType,
    dtype: ir.DataType,
    transpose: bool,
) -> ir.Value:
    scale_shape = e.graph.weights.info(str(scale.target)).shape
    scale_rank = len(scale_shape)
    is_flat = scale_rank == 2 and not block  # [out, 1] → [out]
    inputs = [
        e.codes(codes, stored, transpose=transpose),
        e.weight(scale, dtype, transpose=transpose and scale_rank == 2 and not is_flat, flat=is_flat),
    ]
    rows = e.graph.weights.info(str(codes.target)).shape[0]
    if scale_rank == 2 and scale_shape[0] != rows:  # one per square: ONNX has blocks along one axis, the rows repeat
        places = e.const([row // side for row in range(rows)])
        inputs[1] = e.op("Gather", inputs[1], places, axis=1 if transpose and not is_flat else 0)
    if zero_point is not None:
        inputs.append(
            e.codes(zero_point, stored, transpose=transpose and scale_rank == 2 and not is_flat, flat=is_flat)
        )
    elif stored == ir.DataType.UINT8 and e.graph.weights.info(str(codes.target)).dtype == "int8":
        shape = (math.prod(scale_shape),) if is_flat else scale_shape
        middle = torch.full(shape, 128, dtype=torch.uint8)
        inputs.append(
            e.computed(f"{codes.target}/zero_point", stored, tuple(shape), lambda: iter([middle.reshape(-1)]))
        )
    return e.op(
        "DequantizeLinear",
        *inputs,
        dtype=dtype,
        name=f"{codes.target}/DequantizeLinear",
        axis=(1 - axis if transpose else axis) if scale_rank else None,
        block_size=block or None,
    )


def _linear(e: Emitter, node: fx.Node) -> ir.Value:
    x_node, weight_node = node.args[:2]
    assert isinstance(weight_node, fx.Node)
    x = e.value(x_node, e.float_like(x_node))
    weight = matmul_weight(e, weight_node, dtype_of(x))
    result = e.op("MatMul", x, weight, name=f"{site_of(weight_node, node)}/MatMul")
    bias = argument(node, 2, "bias")
    if bias is None:
        return result
    shift = e.value(bias, dtype_of(x))
    rank = len(x_node.meta.get("shape", ())) if isinstance(x_node, fx.Node) else 0
    if rank > 2 and quantized_value(x_node) is not None:
        # A bias of one dimension lets ONNX Runtime make a float Gemm of product and sum where the sizes are fixed, and
        # with int8 codes it then builds a graph that it refuses itself (1.32).
        shift = e.op("Unsqueeze", shift, e.const(list(range(rank - 1))))
    return e.op("Add", result, shift, name=f"{site_of(weight_node, node)}/Add")


def site_of(weight: fx.Node, node: fx.Node) -> str:
    """The name of the layer that a ``linear`` node is, by the weight it reads."""
    if weight.op == "get_attr" or is_quantized_weight(weight):
        return site_name(stored_names(weight)[0].removesuffix("_codes"))
    return node.name


# --- quantize and dequantize of anything else ------------------------------------------------------------------------


def _quantize(e: Emitter, node: fx.Node) -> ir.Value:
    x_node, scale, zero_point, axis, block, dtype = node.args[:6]
    x = e.value(x_node, e.float_like(x_node))
    code = _NARROW.get((dtype, argument(node, 6, "bits"))) or onnx_dtype(dtype)  # type: ignore[arg-type]
    if _is_dynamic_uint8(x_node, scale, zero_point):
        return _dynamic_quantize(e, x)[0]
    if is_of_blocks(scale):
        return quantize_blocks(e, node, code)
    if is_shared(scale):
        return quantize_shared(e, x, scale, zero_point, code, argument(node, 6, "bits") or 8)
    zero = _zero_point(e, scale, zero_point, code)
    return e.op(
        "QuantizeLinear",
        x,
        e.value(scale, dtype_of(x)),
        zero,
        dtype=code,
        axis=axis,
        block_size=block or None,
        output_dtype=None if zero is not None else int(code),
    )


def _dequantize(e: Emitter, node: fx.Node) -> ir.Value:
    codes, scale, zero_point, axis, block = _dequantize_arguments(node)
    if codes.op == "get_attr" and isinstance(scale, fx.Node) and scale.op == "get_attr":
        places = {"axis": axis, "block": block, "side": block}
        stored = code_dtype(e.graph.weights.info(str(codes.target)).dtype, e.opset)
        return _stored_dequantize(
            e, codes, scale, zero_point, **places, stored=stored, dtype=e.working, transpose=False
        )
    value = e.value(codes)
    if is_shared(scale):
        return dequantize_shared(e, value, scale, zero_point)
    zero = _zero_point(e, scale, zero_point, dtype_of(value))
    scales = e.value(scale, e.working)
    return e.op("DequantizeLinear", value, scales, zero, dtype=e.working, axis=axis, block_size=block or None)


def _zero_point(e: Emitter, scale: object, zero_point: object, code: ir.DataType) -> ir.Value | None:
    """The third input of both operators.

    ONNX Runtime makes an integer product of one scale per tensor only where a zero point is given, be it 0.
    """
    if zero_point is not None:
        return e.value(zero_point, code)
    is_one = isinstance(scale, fx.Node) and scale.meta.get("shape") == ()
    return e.const(0, code) if is_one and code == ir.DataType.INT8 else None


def _dynamic_quantize(e: Emitter, x: ir.Value) -> tuple[ir.Value, ...]:
    """Codes, scale and zero point."""
    dtypes = (ir.DataType.UINT8, _FLOAT, ir.DataType.UINT8)
    return e.ops("DynamicQuantizeLinear", e.cast(x, _FLOAT), dtypes=dtypes)


def _is_dynamic_uint8(x: object, scale: object, zero_point: object) -> bool:
    """Whether scale and zero point are those DynamicQuantizeLinear gives for ``x``."""
    if not (isinstance(scale, fx.Node) and isinstance(zero_point, fx.Node) and is_op(scale, operator.getitem)):
        return False
    chosen = scale.args[0]
    assert isinstance(chosen, fx.Node)
    is_chosen = is_op(chosen, _canonical.choose_qparams.default) and chosen.args == (x, torch.uint8, None)
    return is_chosen and (scale.args, zero_point.args) == ((chosen, 0), (chosen, 1))


def _choose_qparams(e: Emitter, node: fx.Node) -> tuple[ir.Value, ...]:
    x_node, dtype, axis = node.args[0], node.args[1], argument(node, 2, "axis")
    is_plain = (argument(node, 3, "bits") or 8, argument(node, 4, "clip") or 1.0) == (8, 1.0)
    if dtype == torch.uint8 and axis is None and is_plain:
        assert isinstance(x_node, fx.Node)
        return _dynamic_quantize(e, e.value(x_node, e.float_like(x_node)))[1:]
    scale, zero = dynamic_range(e, node)
    if zero is None:
        return scale, e.const(0, ir.DataType.INT8)  # read by nobody: these codes have no zero point
    return scale, e.cast(zero, ir.DataType.UINT8)


# --- rotations -------------------------------------------------------------------------------------------------------


def _hadamard(e: Emitter, node: fx.Node) -> ir.Value:
    """One product with a small matrix for each Kronecker factor, as `qcompiler.numerics.multiply` has it."""
    x_node, block = node.args
    assert isinstance(x_node, fx.Node)
    assert isinstance(block, int)
    factors = factors_of(block)
    assert factors is not None
    x, (*front, width) = e.value(x_node, e.float_like(x_node)), x_node.meta["shape"]
    dtype, kept, result = dtype_of(x), [0] * len(front), x
    for factor in factors:
        matrix = e.const((hadamard_matrix(factor) / factor**0.5).tolist(), dtype)
        rest = [block // factor] if block > factor else []
        result = e.op("Reshape", result, e.const([*kept, width // block, factor, *rest]))
        if rest:
            rank = len(kept) + 3
            result = e.op("Transpose", result, perm=[*range(rank - 2), rank - 1, rank - 2])
        result = e.op("MatMul", result, matrix)
    return e.op("Reshape", result, e.const([*kept, width]), name=f"{node.name}/Hadamard")


# --- norms and rotary ------------------------------------------------------------------------------------------------


def _rms_norm(e: Emitter, node: fx.Node) -> ir.Value:
    # The order Pow, ReduceMean, Add, Sqrt, Div, Mul is the one ONNX Runtime fuses.
    x = e.value(node.args[0])
    wide = e.cast(x, _FLOAT)
    square = e.op("Pow", wide, e.const(2.0, _FLOAT))
    mean = e.op("ReduceMean", square, e.const([-1]), keepdims=1)
    root = e.op("Sqrt", e.op("Add", mean, e.const(node.args[2], _FLOAT)))
    scaled = e.op("Mul", e.op("Div", wide, root), e.value(node.args[1], _FLOAT))
    return e.cast(scaled, dtype_of(x))


def layer_norm(e: Emitter, x: ir.Value, weight: object, bias: object, eps: float, width: ir.Value | int) -> ir.Value:
    """LayerNormalization over the last axis in float32, where squares have room; ``width`` is its size."""
    if weight is None:
        one = e.const(1.0, _FLOAT)
        scale = e.op("Expand", one, e.const([width]) if isinstance(width, int) else width)
    else:
        scale = e.value(weight, _FLOAT)
    shift = None if bias is None else e.value(bias, _FLOAT)
    result = e.op("LayerNormalization", e.cast(x, _FLOAT), scale, shift, axis=-1, epsilon=eps)
    return e.cast(result, dtype_of(x))


def _layer_norm(e: Emitter, node: fx.Node) -> ir.Value:
    (x_node,) = tensor_arguments(node, 1)
    weight, bias, eps = node.args[1:]
    assert isinstance(eps, float)
    return layer_norm(e, e.value(x_node), weight, bias, eps, e.dim(x_node, -1))


def rotary(e: Emitter, node: fx.Node) -> ir.Value:
    """``x * cos + swap(x) * sin'``: the minus sign of one half is put into the sine, once for all layers."""
    x_node, cos_node, sin_node, interleaved = node.args
    assert isinstance(x_node, fx.Node)
    x = e.value(x_node)
    width = x_node.meta["shape"][-1]
    cos, sin = e.value(cos_node), e.value(sin_node)
    if interleaved:
        signs = [-1.0, 1.0] * (width // 2)
        pairs = e.op("Reshape", x, e.const([0, 0, 0, width // 2, 2]))
        even, odd = e.ops("Split", pairs, e.const([1, 1]), dtypes=(dtype_of(x), dtype_of(x)), axis=-1)
        swapped = e.op("Reshape", e.op("Concat", odd, even, axis=-1), e.const([0, 0, 0, width]))
    else:
        half = width // 2
        signs = [-1.0] * half + [1.0] * half
        first, second = e.ops("Split", x, e.const([half, half]), dtypes=(dtype_of(x), dtype_of(x)), axis=-1)
        swapped = e.op("Concat", second, first, axis=-1)
    signed = e.cast(e.op("Mul", sin, e.const(signs, dtype_of(sin))), dtype_of(x))
    return e.op("Add", e.op("Mul", x, e.cast(cos, dtype_of(x))), e.op("Mul", swapped, signed))


# --- attention -------------------------------------------------------------------------------------------------------


def _attention(e: Emitter, node: fx.Node) -> ir.Value:
    q, k, v = tensor_arguments(node, 3)
    mask, scale, causal = node.args[3:6]
    window, softcap = argument(node, 6, "window"), argument(node, 7, "softcap")
    assert isinstance(scale, float)
    return attend(e, q, k, v, mask, scale=scale, causal=bool(causal), window=window, softcap=softcap)


CANONICAL_BUILDERS: Builders = {
    _canonical.linear.default: _linear,
    _canonical.rms_norm.default: _rms_norm,
    _canonical.layer_norm.default: _layer_norm,
    _canonical.rotary.default: rotary,
    _canonical.attention.default: _attention,
    _canonical.hadamard.default: _hadamard,
    _canonical.quantize.default: _quantize,
    _canonical.dequantize.default: _dequantize,
    _canonical.choose_qparams.default: _choose_qparams,
}
