"""Rules of attention, and of the names of operators."""

import onnx_ir as ir

from qcompiler.lowering.tensorrt.legality.operands import Shape, dtype_of, shape_of
from qcompiler.lowering.tensorrt.legality.operators import CUSTOM, MICROSOFT, STANDARD
from qcompiler.lowering.tensorrt.legality.rule import Rule

__all__ = ["OPERATOR_RULES", "is_attention"]

_BUILDER = "seen with tensorrt_rtx 1.7.1.116"
_T = ir.DataType
_ONNX, _TRT, _MICROSOFT = ("", "ai.onnx"), ("trt", ""), "com.microsoft"
_LEAST_HEAD, _MOST_HEAD = 16, 256
_MASK, _PAST, _LENGTHS = 3, (4, 5), 6


def is_attention(node: ir.Node) -> bool:
    """Whether a node is ONNX's Attention, or TensorRT's."""
    return (node.op_type == "Attention" and node.domain in _ONNX) or node.op_type == "TRT_Attention"


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


def _given(node: ir.Node, place: int) -> ir.Value | None:
    return node.inputs[place] if len(node.inputs) > place and is_attention(node) else None


def _outputs(node: ir.Node, _: int) -> str | None:
    if any(_given(node, place) is not None for place in _PAST):
        return "a cache inside of Attention"
    return "more than one output" if is_attention(node) and len(node.outputs) > 1 else None


def _attributes(node: ir.Node, _: int) -> str | None:
    if not is_attention(node):
        return None
    if node.attributes.get_float("softcap", 0.0):
        return "softcap"
    return "softmax_precision" if "softmax_precision" in node.attributes else None


def _is_causal(node: ir.Node) -> bool:
    return bool(node.attributes.get_int("is_causal", 0)) or node.attributes.get_string("causal_kind", "none") != "none"


def _causal_mask(node: ir.Node, _: int) -> str | None:
    return "a causal mask, and one given" if _given(node, _MASK) is not None and _is_causal(node) else None


def _mask_type(node: ir.Node, _: int) -> str | None:
    mask, query = dtype_of(_given(node, _MASK)), dtype_of(node.inputs[0]) if is_attention(node) else None
    if mask is None or query is None or mask in (query, _T.BOOL):
        return None
    return f"a mask of {mask.name} for queries of {query.name}"


def _lengths(node: ir.Node, _: int) -> str | None:
    return "nonpad_kv_seqlen" if _given(node, _LENGTHS) is not None else None


def _heads(node: ir.Node) -> tuple[Shape, Shape, Shape] | None:
    """Heads and channels of queries, keys and values, as far as they are fixed."""
    found = []
    for value, count in zip(node.inputs[:3], ("q_num_heads", "kv_num_heads", "kv_num_heads"), strict=True):
        shape, heads = shape_of(value), node.attributes.get_int(count, 0)
        if shape is None or len(shape) not in (3, 4) or (len(shape) == 3 and not heads):
            return None
        width = shape[-1]
        if len(shape) == 4:
            found.append((shape[1], width))
        else:
            found.append((heads, width // heads if isinstance(width, int) else None))
    return found[0], found[1], found[2]


def _head_sizes(node: ir.Node, _: int) -> str | None:
    heads = _heads(node) if is_attention(node) else None
    if heads is None:
        return None
    query, key, value = heads
    sizes = {size for _, size in heads if isinstance(size, int)}
    if len(sizes) > 1:
        return f"heads of {query[1]} channels in queries, {key[1]} in keys, {value[1]} in values"
    many, few = query[0], key[0]
    if isinstance(many, int) and isinstance(few, int) and few and many % few:
        return f"{many} heads of queries and {few} of keys"
    return None


def _no_kernel(node: ir.Node) -> str | None:
    """Why no fused kernel takes an attention."""
    if not is_attention(node):
        return None
    if dtype_of(node.inputs[0]) == _T.FLOAT:
        return "attention in FLOAT"
    heads = _heads(node)
    size = None if heads is None else heads[0][1]
    if isinstance(size, int) and not _LEAST_HEAD <= size <= _MOST_HEAD:
        return f"heads of {size} channels"
    return "a single head" if heads is not None and heads[0][0] == heads[1][0] == 1 else None


def _refused(node: ir.Node, _: int) -> str | None:
    return None if node.attributes.get_int("TRT_decomposable", 0) else _no_kernel(node)


def _decomposed(node: ir.Node, _: int) -> str | None:
    return _no_kernel(node) if node.attributes.get_int("TRT_decomposable", 0) else None


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
        "attention-cache",
        "refused",
        _outputs,
        "Attention has one output and no cache",
        "Concat past and new keys and values ahead of it, and give it a mask",
        f"{_BUILDER}: 'TensorRT only supports Attention nodes with one output'",
    ),
    Rule(
        "attention-attribute",
        "refused",
        _attributes,
        "Attention neither caps its logits nor chooses a precision",
        "leave the attribute out; write capped attention in plain operators",
        f"{_BUILDER}: 'is not supported in TensorRT Attention'",
    ),
    Rule(
        "attention-causal-mask",
        "refused",
        _causal_mask,
        "a mask is given or causal, not both",
        "one additive mask that holds both",
        f"{_BUILDER}: IAttention::setMask",
    ),
    Rule(
        "attention-mask-type",
        "refused",
        _mask_type,
        "an additive mask has the type of the queries",
        "Cast the mask",
        f"{_BUILDER}: 'Input 0's element type (half) differs from input 1's'",
    ),
    Rule(
        "attention-lengths",
        "wrong",
        _lengths,
        "nonpad_kv_seqlen is not read",
        "a mask that holds the lengths",
        _BUILDER,
    ),
    Rule(
        "attention-heads",
        "refused",
        _head_sizes,
        "keys and values have the channels of queries, and the heads of queries are a multiple of theirs",
        "pad the values; repeat keys and values",
        f"{_BUILDER}: 'must have the same head dimension'",
    ),
    Rule(
        "attention-kernel",
        "refused",
        _refused,
        f"fused kernels take FLOAT16 and BFLOAT16, several heads, and {_LEAST_HEAD} to {_MOST_HEAD} channels in each",
        "float=float16; TRT_decomposable=1 builds it unfused",
        f"{_BUILDER}: 'Attention operation was not supported by a dedicated kernel'",
    ),
    Rule(
        "attention-decomposed",
        "unfused",
        _decomposed,
        f"fused kernels take FLOAT16 and BFLOAT16, several heads, and {_LEAST_HEAD} to {_MOST_HEAD} channels in each",
        "float=float16",
        _BUILDER,
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
