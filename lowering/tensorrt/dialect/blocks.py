"""Attention, norms and rotary embeddings as the operators of opset 23, which TensorRT has layers for."""

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from qcompiler.ir import is_op
from qcompiler.lowering.onnx.builders.attention import attend, attention_bias
from qcompiler.lowering.onnx.builders.canonical import rotary
from qcompiler.lowering.onnx.dtypes import dtype_of
from qcompiler.lowering.onnx.emitter import Builders, Emitter, argument, tensor_arguments

__all__ = ["BLOCK_BUILDERS", "added_mask", "float_attention", "has_kernel"]

_aten, _canonical = torch.ops.aten, torch.ops.qcompiler
_FLOAT = ir.DataType.FLOAT
_SMALLEST_HEAD, _LARGEST_HEAD = 9, 256
_MASKED = -30000.0
"""Added to logits that do not count: fits float16 with room for the logits, and its exponential is 0."""


def float_attention(e: Emitter, node: fx.Node) -> ir.Value:
    """The canonical attention: one operator where there is a kernel, else products of matrices."""
    q, k, v = tensor_arguments(node, 3)
    mask, scale, causal = node.args[3:6]
    window, softcap = argument(node, 6, "window"), argument(node, 7, "softcap")
    assert isinstance(scale, float)
    if softcap is not None or not has_kernel(q, k, v) or e.working == _FLOAT:
        options: dict[str, Any] = {"causal": bool(causal), "window": window, "softcap": softcap}
        return _written_out(e, node, lambda: attend(e, q, k, v, mask, scale=scale, **options))
    return _fused(e, node, q, k, v, mask, scale=scale, causal=bool(causal), window=window, aligned_to_end=True)


def _aten_attention(e: Emitter, node: fx.Node) -> ir.Value:
    q, k, v = tensor_arguments(node, 3)
    mask, causal = argument(node, 3, "attn_mask"), bool(argument(node, 5, "is_causal", False))
    given = node.kwargs.get("scale")
    scale = q.meta["shape"][-1] ** -0.5 if given is None else given
    assert isinstance(scale, float)
    if not has_kernel(q, k, v) or e.working == _FLOAT:
        return _written_out(e, node, lambda: attend(e, q, k, v, mask, scale=scale, causal=causal, aligned_to_end=False))
    return _fused(e, node, q, k, v, mask, scale=scale, causal=causal, window=None, aligned_to_end=False)


def has_kernel(q: fx.Node, k: fx.Node, v: fx.Node) -> bool:
    """Whether there is a kernel: heads of one size, 9 to 256 channels, the queries' a multiple of the keys'."""
    shapes = [node.meta["shape"] for node in (q, k, v)]
    heads, kv_heads = shapes[0][1], shapes[1][1]
    whole = isinstance(heads, int) and isinstance(kv_heads, int) and heads % kv_heads == 0
    return whole and len({shape[-1] for shape in shapes}) == 1 and _SMALLEST_HEAD <= shapes[0][-1] <= _LARGEST_HEAD


def _fused(
    e: Emitter,
    node: fx.Node,
    q: fx.Node,
    k: fx.Node,
    v: fx.Node,
    mask: object,
    *,
    scale: float,
    causal: bool,
    window: int | None,
    aligned_to_end: bool,
) -> ir.Value:
    """One Attention."""
    values = [e.value(part, e.working) for part in (q, k, v)]
    bias = added_mask(e, q, k, mask, causal=causal, window=window, aligned_to_end=aligned_to_end)
    name = f"{node.name}/Attention"
    result = e.op("Attention", *values, bias, dtype=e.working, name=name, scale=scale)
    e.attentions[node.name] = [name]
    return result


def added_mask(
    e: Emitter, q: fx.Node, k: fx.Node, mask: object, *, causal: bool, window: int | None, aligned_to_end: bool
) -> ir.Value | None:
    """A mask that is added to the logits, in the working dtype: of one that forbids, the builder makes nine kernels.

    Rows without any key to attend to give an average of values instead of zeros: nothing reads them, they are padding.
    """
    bias = attention_bias(e, q, k, mask, causal=causal, window=window, aligned_to_end=aligned_to_end)
    return None if bias is None else e.cast(e.op("Max", bias, e.const(_MASKED, _FLOAT)), e.working)


def _written_out(e: Emitter, node: fx.Node, build: Callable[[], ir.Value]) -> ir.Value:
    """An attention that no kernel takes: products of matrices."""
    before = len(e.nodes)
    result = build()
    e.attentions[node.name] = [made.name or "" for made in e.nodes[before:] if made.op_type == "MatMul"]
    return result


def _rms_norm(e: Emitter, node: fx.Node) -> ir.Value:
    """In float32, where squares have room."""
    x = e.value(node.args[0])
    weight = e.value(node.args[1], _FLOAT)
    normed = e.op("RMSNormalization", e.cast(x, _FLOAT), weight, dtype=_FLOAT, axis=-1, epsilon=node.args[2])
    return e.cast(normed, dtype_of(x))


def _rotary(e: Emitter, node: fx.Node) -> ir.Value:
    """RotaryEmbedding where both halves of the angles are proved to be one tensor; else written out."""
    x_node, cos_node, sin_node, interleaved = node.args
    assert isinstance(x_node, fx.Node)
    shape = x_node.meta["shape"]
    tables = [node for node in (cos_node, sin_node) if isinstance(node, fx.Node) and _is_repeated(node)]
    fits = [_fits(table.meta["shape"], shape) for table in tables]
    if interleaved or len(fits) != 2 or not all(fits):
        return rotary(e, node)
    x, half = e.value(x_node), shape[-1] // 2

    def table(node: fx.Node) -> ir.Value:
        value = e.cast(e.value(node), dtype_of(x))
        first = e.op("Slice", value, e.const([0]), e.const([half]), e.const([-1]))
        return e.op("Squeeze", first, e.const([1]))

    return e.op("RotaryEmbedding", x, *(table(node) for node in tables), interleaved=0)


def _fits(table: tuple[object, ...], shape: tuple[object, ...]) -> bool:
    """Whether a table is ``[B, 1, S, D]`` beside ``[B, H, S, D]``."""
    return len(table) == 4 and table[1] == 1 and (table[0], *table[2:]) == (shape[0], *shape[2:])


_KEEPING = (
    _aten.cos.default,
    _aten.sin.default,
    _aten.unsqueeze.default,
    _aten._to_copy.default,
    _aten.to.dtype,
)


def _is_repeated(node: object) -> bool:
    """Whether the halves of a tensor's last axis are equal: ``cat((a, a))`` behind operators that work by element."""
    while isinstance(node, fx.Node):
        if is_op(node, _aten.cat.default):
            parts = node.args[0]
            assert isinstance(parts, (list, tuple))
            return len(parts) == 2 and parts[0] is parts[1] and argument(node, 1, "dim", 0) in (-1, _rank(node) - 1)
        if is_op(node, _aten.unsqueeze.default) and node.args[1] in (-1, _rank(node) - 1):
            return False
        by_number = is_op(node, _aten.mul.Tensor, _aten.mul.Scalar) and not isinstance(node.args[1], fx.Node)
        if not (by_number or is_op(node, *_KEEPING)):
            return False
        node = node.args[0]
    return False


def _rank(node: fx.Node) -> int:
    return len(node.meta["shape"])


BLOCK_BUILDERS: Builders = {
    _canonical.attention.default: float_attention,
    _aten.scaled_dot_product_attention.default: _aten_attention,
    _canonical.rms_norm.default: _rms_norm,
    _canonical.rotary.default: _rotary,
}
