"""Rules of attention."""

import onnx_ir as ir

from qcompiler.lowering.tensorrt.legality.model import is_constant
from qcompiler.lowering.tensorrt.legality.operands import Shape, dtype_of, shape_of
from qcompiler.lowering.tensorrt.legality.rule import Rule

__all__ = ["ATTENTION_RULES", "is_attention", "is_quantized_attention"]

_BUILDER = "seen with tensorrt_rtx 1.7.1.116"
_T = ir.DataType
_ONNX = ("", "ai.onnx")
_LEAST_HEAD, _MOST_HEAD = 9, 256  # padded to a multiple of 8, of which the smallest is 16
_MASK, _PAST, _LENGTHS = 3, (4, 5), 6
_CHANNELS_OF_FLOAT8, _LEAST_KEYS = 8, 32

_KERNELS = (
    f"fused kernels take FLOAT16 and BFLOAT16, heads of {_LEAST_HEAD} to {_MOST_HEAD} channels, and a mask for several "
    "heads alone"
)


def is_attention(node: ir.Node) -> bool:
    """Whether a node is ONNX's Attention, or TensorRT's."""
    return (node.op_type == "Attention" and node.domain in _ONNX) or node.op_type == "TRT_Attention"


def is_quantized_attention(node: ir.Node) -> bool:
    """Whether a node is TensorRT's attention of codes."""
    return node.op_type == "TRT_QuantizedAttention"


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
    single = heads is not None and heads[0][0] == heads[1][0] == 1
    return "a single head with a mask" if single and _given(node, _MASK) is not None else None


def _flat(node: ir.Node, _: int) -> str | None:
    shape = shape_of(node.inputs[0]) if node.op_type == "TRT_Attention" else None
    return None if shape is None or len(shape) == 4 else f"TRT_Attention of {len(shape)} dimensions"


def _refused(node: ir.Node, _: int) -> str | None:
    return None if node.attributes.get_int("TRT_decomposable", 0) else _no_kernel(node)


def _decomposed(node: ir.Node, _: int) -> str | None:
    return _no_kernel(node) if node.attributes.get_int("TRT_decomposable", 0) else None


def _quantized(node: ir.Node, _: int) -> str | None:
    """Why no kernel takes an attention of codes."""
    if not is_quantized_attention(node):
        return None
    if node.attributes.get_int("normalization_quantize_to_type", _T.FLOAT8E4M3FN) != _T.FLOAT8E4M3FN:
        return "a softmax in INT8"
    if dtype_of(node.inputs[0]) == _T.FLOAT:
        return "attention of codes in FLOAT"
    if not all(_is_float8(value) for value in node.inputs[:3]):
        return "queries, keys or values that are no FP8 codes"
    heads, shapes = _heads(node), [shape_of(value) for value in node.inputs[:2]]
    size = None if heads is None else heads[0][1]
    if isinstance(size, int) and (size % _CHANNELS_OF_FLOAT8 or size > _MOST_HEAD):
        return f"heads of {size} channels"
    if heads is not None and heads[0][0] == heads[1][0] == 1:
        return "a single head"
    tokens, keys = (None if shape is None else shape[-2] for shape in shapes)
    is_short = isinstance(keys, int) and keys < _LEAST_KEYS and isinstance(tokens, int) and tokens > 1
    return f"{keys} keys" if is_short else None


def _is_float8(value: ir.Value | None) -> bool:
    maker = None if value is None else value.producer()
    return maker is not None and maker.op_type == "DequantizeLinear" and dtype_of(maker.inputs[0]) == _T.FLOAT8E4M3FN


_BETWEEN = ("Add", "Sub", "Mul", "Div", "Where", "Max", "Cast", "Identity")
_MOVES = ("Reshape", "Transpose", "Unsqueeze", "Squeeze")


def _written_out(node: ir.Node, _: int) -> str | None:
    """Softmax between two products of activations that no pattern of the builder takes for attention."""
    if node.op_type != "Softmax":
        return None
    ahead, moved = _product_ahead(node)
    behind, moved_behind = _product_behind(node)
    if ahead is None or behind is None:
        return None
    if dtype_of(behind.outputs[0]) == _T.FLOAT:
        return "attention in FLOAT, in plain operators"
    ranks = {len(shape) for shape in (shape_of(ahead.outputs[0]), shape_of(behind.outputs[0])) if shape is not None}
    if ranks and ranks != {4}:
        return f"attention in products of {max(ranks)} dimensions"
    return "attention with heads that move around its softmax" if moved or moved_behind else None


def _product_ahead(node: ir.Node) -> tuple[ir.Node | None, bool]:
    """The product that a softmax is of, and whether its axes move on the way."""
    stack: list[tuple[ir.Value | None, bool]] = [(node.inputs[0], False)]
    for _ in range(32):  # scaling, capping and masking take fewer
        if not stack:
            return None, False
        value, moved = stack.pop()
        maker = None if value is None or is_constant(value) else value.producer()
        if maker is None:
            continue
        if maker.op_type == "MatMul":
            if not any(is_constant(each) for each in maker.inputs):
                return maker, moved
        elif maker.op_type in (*_BETWEEN, *_MOVES):
            stack += [(each, moved or maker.op_type in _MOVES) for each in reversed(maker.inputs)]
    return None, False


def _product_behind(node: ir.Node) -> tuple[ir.Node | None, bool]:
    """The product that reads a softmax, and whether its axes move on the way."""
    value, moved = node.outputs[0], False
    while True:
        readers = [reader for reader, _ in value.uses()]
        if len(readers) != 1 or readers[0].op_type not in ("MatMul", *_BETWEEN, *_MOVES):
            return None, False
        if readers[0].op_type == "MatMul":
            return (None, False) if any(is_constant(each) for each in readers[0].inputs) else (readers[0], moved)
        moved = moved or readers[0].op_type in _MOVES
        value = readers[0].outputs[0]


ATTENTION_RULES: tuple[Rule[ir.Node], ...] = (
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
        "attention-rank",
        "refused",
        _flat,
        "heads are an axis of their own",
        "Reshape and Transpose to [batch, heads, length, channels]",
        f"{_BUILDER}: 'must be 4D for padded (BHND) form'",
    ),
    Rule(
        "attention-kernel",
        "refused",
        _refused,
        _KERNELS,
        "float=float16; TRT_decomposable=1 builds it unfused",
        f"{_BUILDER}: 'Attention operation was not supported by a dedicated kernel'",
    ),
    Rule(
        "attention-decomposed",
        "unfused",
        _decomposed,
        _KERNELS,
        "float=float16",
        _BUILDER,
    ),
    Rule(
        "attention-of-codes",
        "refused",
        _quantized,
        "its kernels take queries, keys and values of FP8 codes straight from DequantizeLinear in 16 bits, several "
        f"heads of up to {_MOST_HEAD} channels, a multiple of {_CHANNELS_OF_FLOAT8}, and {_LEAST_KEYS} keys or more "
        "where there is more than one query",
        "FP8 codes, and FP8 for the softmax; Attention in FLOAT16 for other shapes",
        f"{_BUILDER}: 'Attention operation was not supported by a dedicated kernel'",
    ),
    Rule(
        "attention-written-out",
        "unfused",
        _written_out,
        "the builder takes products and softmax for attention where they are of 4 dimensions and 16 bits, with nothing "
        "but scaling, masking and casts in between",
        "ONNX's Attention of opset 23; or FLOAT16, and keys and values expanded to the heads of the queries",
        _BUILDER,
    ),
)
