"""Rules of matrix products with quantized weights: what a kernel takes in, and what it does not."""

import onnx_ir as ir

from qcompiler.lowering.tensorrt.legality.model import is_constant
from qcompiler.lowering.tensorrt.legality.operands import Product, computed_weight, dtype_of, product_of
from qcompiler.lowering.tensorrt.legality.rule import Rule

__all__ = ["PRODUCT_RULES"]

_BUILDER = "seen with tensorrt_rtx 1.7.1.116"
_T = ir.DataType
_BYTES = (_T.INT8, _T.FLOAT8E4M3FN)
_TURING = 75


def _weight_only(node: ir.Node) -> Product | None:
    found = product_of(node)
    return None if found is None or found.rounds else found


def _rounded(node: ir.Node) -> Product | None:
    found = product_of(node)
    return None if found is None or not found.rounds else found


def _name(product: Product) -> str:
    codes = product.weight.codes
    return "weights" if codes is None else f"{codes.name} weights"


def _int4_one_block(node: ir.Node, _: int) -> str | None:
    found = _weight_only(node)
    if found is None or found.activation is not None or found.weight.codes != _T.INT4:
        return None
    scales = found.weight.granularity
    return None if scales.kind == "unknown" or scales.is_blocked else f"INT4 weights, scales per {_kind(scales.kind)}"


def _kind(kind: str) -> str:
    return {"block": "channel (one block)"}.get(kind, kind)


def _blocks_of_bytes(node: ir.Node, _: int) -> str | None:
    found = _weight_only(node)
    if found is None or found.weight.codes not in _BYTES or not found.weight.granularity.is_blocked:
        return None
    return f"{_name(found)} in {found.weight.granularity.blocks} blocks"


def _int4_times_rounded(node: ir.Node, _: int) -> str | None:
    found = product_of(node)
    if found is None or found.activation is None or found.weight.codes != _T.INT4:
        return None
    return f"INT4 weights by {_named(found.activation.codes)} activations"


def _blocks_times_rounded(node: ir.Node, _: int) -> str | None:
    found = _rounded(node)
    if found is None or found.weight.codes not in _BYTES or not found.weight.granularity.is_blocked:
        return None
    return f"{_name(found)} in {found.weight.granularity.blocks} blocks by rounded activations"


def _named(dtype: ir.DataType | None) -> str:
    return "unknown" if dtype is None else dtype.name


def _types_differ(node: ir.Node, _: int) -> str | None:
    found = _rounded(node)
    weight = None if found is None else found.weight.codes
    if found is None or found.activation is None or weight not in (*_BYTES, _T.FLOAT4E2M1):
        return None
    other = found.activation.codes
    other = _T.INT8 if other == _T.UINT8 else other  # which the parser makes of it, a rule of its own
    return None if other is None or weight == other else f"{weight.name} weights by {other.name} activations"


def _scales_differ(node: ir.Node, _: int) -> str | None:
    found = _rounded(node)
    if found is None or found.activation is None:
        return None
    weight, other = dtype_of(found.weight.scale), dtype_of(found.activation.scale)
    is_tensor = found.weight.granularity.kind == "tensor"
    if weight is None or other is None or weight == other or is_tensor or found.weight.codes not in _BYTES:
        return None
    return f"scales of {weight.name} for weights and {other.name} for activations"


def _scale_at_run_time(node: ir.Node, _: int) -> str | None:
    found = _rounded(node)
    if found is None or found.activation is None or is_constant(found.activation.scale):
        return None
    scaled = found.activation.scale.producer() if found.activation.scale is not None else None
    if scaled is not None and scaled.op_type == "DequantizeLinear":  # of TRT_FP4DynamicQuantize
        return None
    return f"a scale per {found.activation.granularity.kind} of activations, computed at run time"


def _cast(node: ir.Node, _: int) -> str | None:
    """A change of type between scale and product, for weights that are not multiplied in 8 bits."""
    found = _weight_only(node)
    if found is None or found.weight.codes is None:
        return None
    scale, made = dtype_of(found.weight.scale), dtype_of(found.weight.dequantize.outputs[0])
    used = dtype_of(node.inputs[1] if is_constant(node.inputs[1]) else node.inputs[0])
    if scale is None or used is None or made is None or scale == used:
        return None
    if found.weight.codes in _BYTES and scale == _T.FLOAT and made in (scale, used):
        return None
    return f"{_name(found)}, scales of {scale.name}, multiplied in {used.name}"


def _output_differs(node: ir.Node, _: int) -> str | None:
    """As `_cast`, where activations are rounded: their own types decide, too."""
    found = _rounded(node)
    if found is None or found.weight.codes not in _BYTES:
        return None
    scale, made = dtype_of(found.weight.scale), dtype_of(found.weight.dequantize.outputs[0])
    if scale is None or made is None or scale == made:
        return None
    return f"{_name(found)}, scales of {scale.name}, dequantized to {made.name}"


def _odd(node: ir.Node, _: int) -> str | None:
    found = _weight_only(node)
    if found is None or found.shape is None or len(found.shape) < 2:
        return None
    odd = [size for size in found.shape[-2:] if isinstance(size, int) and size % 2]
    if not odd or found.weight.granularity.kind == "tensor":
        return None
    return f"{_name(found)} {list(found.shape)}"


def _vector(node: ir.Node, _: int) -> str | None:
    found = _weight_only(node)
    return f"{_name(found)} by a vector" if found is not None and found.rank == 1 else None


def _computed(node: ir.Node, _: int) -> str | None:
    found = computed_weight(node)
    return None if found is None else f"{found} between codes and product"


def _fp4(node: ir.Node, _: int) -> str | None:
    found = _weight_only(node)
    return "FLOAT4E2M1 weights" if found is not None and found.weight.codes == _T.FLOAT4E2M1 else None


def _turing(node: ir.Node, sm: int) -> str | None:
    found = _weight_only(node)
    if sm != _TURING or found is None or found.weight.codes != _T.INT8 or found.rank == 2:
        return None
    return f"INT8 weights on SM {sm}"


def _turing_float(node: ir.Node, sm: int) -> str | None:
    if sm != _TURING or node.op_type not in ("MatMul", "Gemm", "Conv") or dtype_of(node.inputs[0]) != _T.FLOAT:
        return None
    return f"{node.op_type} in FLOAT on SM {sm}"


PRODUCT_RULES: tuple[Rule[ir.Node], ...] = (
    Rule(
        "int4-one-block",
        "unfused",
        _int4_one_block,
        "INT4 kernels take several blocks of scales along an axis; with one, weights are widened first",
        "write the same scales as two or more equal blocks",
        _BUILDER,
    ),
    Rule(
        "bytes-in-blocks",
        "unfused",
        _blocks_of_bytes,
        "INT8 and FP8 kernels take one scale or one for each channel; blocks are widened first",
        "scales per channel, or INT4 codes in blocks",
        _BUILDER,
    ),
    Rule(
        "int4-times-rounded",
        "refused",
        _int4_times_rounded,
        "no kernel multiplies INT4 weights by rounded activations: the build fails, or widens the weights, or loses "
        "the scales of the blocks",
        "multiply with the scale of the activations ahead of the product: Q(x/s) → DQ → Mul(s) → MatMul",
        f"{_BUILDER}: 'CHECK(is_constant()) failed', or a gemm without the block scales in its layer list",
    ),
    Rule(
        "blocks-times-rounded",
        "refused",
        _blocks_times_rounded,
        "no kernel multiplies weights in blocks by rounded activations: the build fails, or loses the scales of blocks",
        "scales per channel; or the scale of the activations multiplied in ahead of the product",
        f"{_BUILDER}: 'CHECK(is_constant()) failed', or a gemm without the block scales in its layer list",
    ),
    Rule(
        "types-of-codes-differ",
        "refused",
        _types_differ,
        "both sides of a product in 8 bits are INT8 or both FP8",
        "round activations to the type of the weights",
        f"{_BUILDER}: 'Input and filter have to be the same type'",
    ),
    Rule(
        "types-of-scales-differ",
        "refused",
        _scales_differ,
        "scales of both sides are of one type",
        "cast the input ahead of QuantizeLinear, and scales with it",
        f"{_BUILDER}: 'type mismatch between matmul operand scales'",
    ),
    Rule(
        "scale-at-run-time",
        "refused",
        _scale_at_run_time,
        "scales of rounded activations are constants",
        "divide and multiply outside: x/s → Q(1) → DQ(1) → MatMul → Mul(s)",
        f"{_BUILDER}: 'CHECK(is_constant()) failed'",
    ),
    Rule(
        "cast-behind-scale",
        "unfused",
        _cast,
        "a change of type between scales and product is not taken in: weights are widened first",
        "scales of the type that is multiplied in, DequantizeLinear straight into the product",
        _BUILDER,
    ),
    Rule(
        "output-type-of-weights",
        "refused",
        _output_differs,
        "DequantizeLinear of weights must give floats of the scale's type",
        "no output_dtype",
        f"{_BUILDER}: 'type mismatch between matmul operand scales'",
    ),
    Rule(
        "odd-size",
        "unfused",
        _odd,
        "kernels for low-bit weights take even sizes",
        "pad the weight to even sizes",
        _BUILDER,
    ),
    Rule("vector", "unfused", _vector, "a vector has no such kernel", "give the input a batch dimension", _BUILDER),
    Rule(
        "computed-weight",
        "unfused",
        _computed,
        "weights that are computed from codes in another way than by one scale are widened first",
        "x·DQ(w) less (sums of x over blocks)·(scale·zero point) for zero points; a uniform grid for tables",
        _BUILDER,
    ),
    Rule(
        "fp4-weight-only",
        "unfused",
        _fp4,
        "FP4 kernels take FP4 activations alone",
        "TRT_FP4DynamicQuantize on the activations",
        _BUILDER,
    ),
    Rule(
        "int8-weight-only-on-turing",
        "unfused",
        _turing,
        "Turing has no kernel for it, but with inputs of two dimensions",
        "round the activations too, or reshape the input to two dimensions",
        _BUILDER,
    ),
    Rule(
        "float-on-turing",
        "refused",
        _turing_float,
        "Turing has no product in FLOAT",
        "FLOAT16",
        f"{_BUILDER}: 'Cannot compile operation ... for Turing (SM75)'",
    ),
)
