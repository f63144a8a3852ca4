"""Rules of operators: names that the parser knows, and what it does not take of them."""

import onnx_ir as ir

from qcompiler.lowering.tensorrt.legality.model import constant_of, is_constant
from qcompiler.lowering.tensorrt.legality.operands import dtype_of, shape_of
from qcompiler.lowering.tensorrt.legality.operators import CUSTOM, MICROSOFT, PLUGINS, STANDARD
from qcompiler.lowering.tensorrt.legality.rule import Rule

__all__ = ["OPERATOR_RULES"]

_BUILDER = "seen with tensorrt_rtx 1.7.1.116"
_T = ir.DataType
_ONNX, _TRT, _MICROSOFT = ("", "ai.onnx"), ("trt", ""), "com.microsoft"
_REDUCES = ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare")
_AXES = ("Squeeze", "Unsqueeze", *(f"Reduce{kind}" for kind in _REDUCES))
_ONE_OUTPUT = ("LayerNormalization", "MaxPool", "RMSNormalization")


def _unknown(node: ir.Node, _: int) -> str | None:
    if node.op_type in CUSTOM and node.domain in _TRT:
        return None
    known = MICROSOFT if node.domain == _MICROSOFT else STANDARD
    is_there = node.op_type in known or (
        node.domain not in (*_ONNX, _MICROSOFT) and node.op_type in (STANDARD | CUSTOM)
    )
    return None if is_there else f"{node.domain}.{node.op_type}".lstrip(".")


def _other_domain(node: ir.Node, _: int) -> str | None:
    strange = node.domain not in (*_ONNX, _MICROSOFT, "trt") and node.op_type in STANDARD | CUSTOM
    return f"{node.domain}.{node.op_type}" if strange else None


def _plugin(node: ir.Node, _: int) -> str | None:
    return node.op_type if node.op_type in PLUGINS and node.domain in _ONNX else None


def _axes(node: ir.Node, _: int) -> str | None:
    if node.op_type not in _AXES or node.domain not in _ONNX or len(node.inputs) < 2 or node.inputs[1] is None:
        return None
    return None if is_constant(node.inputs[1]) else f"axes of {node.op_type} computed at run time"


def _reshape(node: ir.Node, _: int) -> str | None:
    data = shape_of(node.inputs[0]) if node.op_type == "Reshape" and node.domain in _ONNX else None
    wanted = None if data is None else constant_of(node.inputs[1])
    if data is None or wanted is None or not all(isinstance(size, int) for size in data):
        return None
    sizes = [int(size) for size in wanted.reshape(-1)]
    count, given = 1, 1
    for size in data:
        count *= size if isinstance(size, int) else 1
    if any(size == 0 for size in sizes):
        return None
    for size in sizes:
        given *= abs(size)
    fits = count % given == 0 if -1 in sizes else count == given
    return None if fits else f"Reshape of {list(data)} to {sizes}"


def _results(node: ir.Node, _: int) -> str | None:
    several = node.op_type in _ONE_OUTPUT and len(node.outputs) > 1
    return f"{len(node.outputs)} outputs of {node.op_type}" if several else None


def _mode(node: ir.Node, _: int) -> str | None:
    if node.op_type == "ScatterND" and node.attributes.get_string("reduction", "none") != "none":
        return "ScatterND with a reduction"
    if node.op_type == "TensorScatter" and node.attributes.get_string("mode", "linear") != "linear":
        return "TensorScatter in a circle"
    return None


def _scatter(node: ir.Node, _: int) -> str | None:
    dtype = dtype_of(node.inputs[0]) if node.op_type in ("TensorScatter", "TRT_KVCacheUpdate") else None
    return None if dtype is None or dtype in (_T.FLOAT, _T.FLOAT16, _T.BFLOAT16) else f"{node.op_type} of {dtype.name}"


OPERATOR_RULES: tuple[Rule[ir.Node], ...] = (
    Rule(
        "unknown-operator",
        "refused",
        _unknown,
        "the parser does not know the operator and looks for a plugin",
        "write it in operators of ONNX",
        f"OnnxParser.supports_operator; {_BUILDER}: 'Plugin not found'",
    ),
    Rule(
        "other-domain",
        "wrong",
        _other_domain,
        "the parser looks at names alone: it builds ONNX's operator of this name",
        "rename the operator",
        _BUILDER,
    ),
    Rule(
        "plugin",
        "refused",
        _plugin,
        "the parser makes it with a plugin that does not come along",
        "write it in other operators",
        f"{_BUILDER}: 'plugin ... was not found in plugin registry'",
    ),
    Rule(
        "axes",
        "refused",
        _axes,
        "axes are constants",
        "an initializer",
        f"{_BUILDER}: 'Axis input must resolve to a build-time constant'",
    ),
    Rule(
        "reshape",
        "refused",
        _reshape,
        "a Reshape moves elements; it makes and drops none",
        "a shape of as many elements",
        f"{_BUILDER}: 'reshape changes volume'",
    ),
    Rule(
        "outputs",
        "refused",
        _results,
        "only the first output is there",
        "compute the others in operators of their own",
        f"{_BUILDER}: 'This version of TensorRT doesn't support mode than 1 outputs'",
    ),
    Rule(
        "scatter-mode",
        "refused",
        _mode,
        "updates take the place of what was there",
        "Gather, compute, and write back",
        f"{_BUILDER}: 'ScatterND with reduction is not supported', 'Only linear mode is supported'",
    ),
    Rule(
        "cache-of-codes",
        "refused",
        _scatter,
        "caches that are written in place hold floats alone",
        "codes as inputs and outputs of the engine, and Concat",
        f"{_BUILDER}: 'cache has type Int8 but must have type Float, Half, or BFloat16'",
    ),
)
