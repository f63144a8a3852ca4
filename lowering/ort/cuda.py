"""Which nodes of a model ONNX Runtime's CUDA provider has kernels for, by operator and dtypes.

Source: docs/OperatorKernels.md of ONNX Runtime (CUDAExecutionProvider), at opset 23; of what the writer emits, all.
What is computed of constants alone is folded when the model is loaded, and needs no kernel.
"""

from collections.abc import Mapping

import onnx_ir as ir

__all__ = ["KERNELS", "nodes_off_cuda"]

_FLOATS = frozenset({"FLOAT", "FLOAT16", "DOUBLE"})
_WIDE = frozenset({"INT32", "INT64", "UINT32", "UINT64"})
_NARROW = frozenset({"INT8", "UINT8", "INT16", "UINT16"})
_BOOL = frozenset({"BOOL"})
_INDEX = frozenset({"INT32", "INT64"})
_FLOAT8 = frozenset({"FLOAT8E4M3FN", "FLOAT8E5M2"})
_INT4 = frozenset({"INT4", "UINT4"})
_BYTES = frozenset({"INT8", "UINT8"})
_NUMBERS = _FLOATS | _WIDE | _NARROW
_ANY = _NUMBERS | _BOOL
_SINGLE = frozenset({"FLOAT", "FLOAT16"})
_HALF = frozenset({"FLOAT16"})
_ONE = frozenset({"FLOAT"})

_Types = tuple[frozenset[str], ...]

KERNELS: Mapping[tuple[str, str], _Types] = {
    **{("", name): (_NUMBERS,) for name in ("Abs", "Add", "Sub", "Mul", "Div")},
    **{("", name): (_BOOL,) for name in ("And", "Or", "Not")},
    **{("", name): (_FLOATS, _INDEX) for name in ("ArgMax", "ArgMin")},
    ("", "Cast"): (_ANY | _FLOAT8,),
    ("", "Clip"): (_FLOATS | _BYTES | {"INT64", "UINT64"},),
    **{("", name): (_ANY,) for name in ("Concat", "Where")},
    **{
        ("", name): (_ANY, _INDEX)
        for name in (
            "Expand",
            "Gather",
            "GatherElements",
            "Slice",
            "Split",
            "Squeeze",
            "Tile",
            "Transpose",
            "Unsqueeze",
        )
    },
    ("", "ConstantOfShape"): (_INDEX,),
    ("", "CumSum"): (_FLOATS | _WIDE, _INDEX),
    ("", "DequantizeLinear"): (_FLOAT8 | _INT4 | _BYTES, _SINGLE, _FLOAT8 | _INT4 | _BYTES),
    ("", "Equal"): (_BOOL | _FLOATS | _WIDE,),
    **{("", name): (_FLOATS | _WIDE,) for name in ("Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Max", "Min")},
    **{
        ("", name): (_FLOATS,)
        for name in ("Cos", "Erf", "Exp", "Floor", "Gelu", "LayerNormalization", "Log", "MatMul", "Reciprocal", "Relu")
    },
    **{
        ("", name): (_FLOATS,)
        for name in ("RMSNormalization", "Round", "Sigmoid", "Sin", "Softmax", "Softplus", "Sqrt", "Tanh")
    },
    ("", "GatherND"): (_FLOATS | {"BOOL", "INT64"}, _INDEX),
    ("", "Identity"): (_ANY | _FLOAT8,),
    ("", "IsInf"): (_FLOATS | _FLOAT8,),
    ("", "Mod"): (_FLOATS | _WIDE,),
    ("", "Neg"): (_FLOATS | {"INT8", "INT16", "INT32", "INT64"},),
    ("", "NonZero"): (_BOOL | _SINGLE | _INDEX | {"UINT8"},),
    ("", "Pow"): (_FLOATS | _INDEX,),
    ("", "QuantizeLinear"): (_SINGLE, _SINGLE, _FLOAT8 | _INT4 | _BYTES),
    ("", "Range"): (_INDEX | {"DOUBLE", "FLOAT", "INT16"},),
    **{("", name): (_FLOATS | _INDEX, _INDEX) for name in ("ReduceMax", "ReduceMin", "ReduceSum")},
    ("", "ReduceMean"): (_FLOATS | {"INT32"}, _INDEX),
    **{("", name): (_FLOATS, _INDEX) for name in ("ReduceLogSumExp", "ReduceSumSquare")},
    ("", "Reshape"): (_ANY | _FLOAT8, _INDEX),
    **{("", name): (_ANY, _INDEX, _ANY) for name in ("ScatterElements", "ScatterND")},
    ("", "Shape"): (_ANY | _FLOAT8,),
    ("", "TopK"): (_FLOATS | _INDEX, _INDEX),
    ("", "Trilu"): (_ANY, _INDEX),
    ("com.microsoft", "GatherBlockQuantized"): (_INT4 | {"UINT8"}, _INDEX, _SINGLE, _INT4 | {"UINT8"}),
    ("com.microsoft", "GroupQueryAttention"): (
        _HALF,
        _HALF,
        _HALF,
        _HALF | {"FLOAT8E4M3FN", "INT8"},
        _HALF | {"FLOAT8E4M3FN", "INT8"},
        frozenset({"INT32"}),
        frozenset({"INT32"}),
        _HALF,
        _HALF,
        _INDEX,
        _HALF,
        _HALF,
        _ONE,
        _ONE,
    ),
    ("com.microsoft", "MatMulNBits"): (_SINGLE, frozenset({"UINT8"}), _SINGLE, _SINGLE | {"UINT8"}, _INDEX, _SINGLE),
    ("com.microsoft", "RotaryEmbedding"): (_SINGLE, frozenset({"INT64"}), _SINGLE, _SINGLE),
    ("com.microsoft", "SkipLayerNormalization"): (_SINGLE,),
    ("com.microsoft", "SkipSimplifiedLayerNormalization"): (_SINGLE,),
}
"""By domain and operator: what each input may be; the last entry stands for all behind it."""


def nodes_off_cuda(model: ir.Model) -> list[str]:
    """The nodes that run on the CPU all the same, each with its operator and dtypes."""
    constant = set(model.graph.initializers.values())
    found = []
    for node in model.graph:
        inputs = [value for value in node.inputs if value is not None]
        if inputs and constant.issuperset(inputs):
            constant.update(node.outputs)
            continue
        dtypes = [None if value is None or value.dtype is None else value.dtype.name for value in node.inputs]
        if not _has_kernel(node, dtypes):
            kinds = ", ".join(str(dtype).lower() for dtype in dtypes if dtype)
            found.append(f"{node.name}: {node.op_type} of {kinds}")
    return found


def _has_kernel(node: ir.Node, dtypes: list[str | None]) -> bool:
    allowed = KERNELS.get((node.domain, node.op_type))
    if allowed is None:
        return False
    to = [value.dtype.name for value in node.outputs if value.dtype is not None] if node.op_type == "Cast" else []
    places = [allowed[min(place, len(allowed) - 1)] for place in range(len(dtypes))]
    each = zip(dtypes, places, strict=True)
    return all(dtype is None or dtype in types for dtype, types in each) and all(dtype in allowed[0] for dtype in to)
