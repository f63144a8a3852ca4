"""Softmax attention in standard ONNX operators, with grouped heads and one mask for all layers."""

import numpy as np
import onnx_ir as ir
from torch import fx

from qcompiler.errors import TargetError
from qcompiler.lowering.onnx.dtypes import dtype_of
from qcompiler.lowering.onnx.emitter import Emitter

__all__ = ["attend", "attention_bias"]

_FLOAT = ir.DataType.FLOAT
_LOWEST = float(np.finfo(np.float32).min)


def attend(
    e: Emitter,
    q: fx.Node,
    k: fx.Node,
    v: fx.Node,
    mask: object,
    *,
    scale: float,
    causal: bool,
    window: int | None = None,
    softcap: float | None = None,
    aligned_to_end: bool = True,
) -> ir.Value:
    """Softmax attention with grouped keys and values, which are never repeated.

    The query heads of a group are stacked along the sequence, ``[B, Hkv, G*S, D]``, so that one product per key head
    serves them all. The softmax is in float32; masked logits get the lowest finite float, so that a row without any key
    stays finite; it is set to zero at the end.

    Args:
        e: the emitter.
        q, k, v, mask, scale, causal, window, softcap: as the canonical operator.
        aligned_to_end: query ``s`` sees keys up to ``T - S + s``; otherwise up to ``s``.
    """
    heads, kv_heads = q.meta["shape"][1], k.meta["shape"][1]
    if not (isinstance(heads, int) and isinstance(kv_heads, int) and heads % kv_heads == 0):
        raise TargetError("attention needs a fixed number of heads", where=e.scope, got=f"{heads} over {kv_heads}")
    groups = heads // kv_heads
    depth, value_depth = q.meta["shape"][-1], v.meta["shape"][-1]
    query, key, values = e.value(q), e.value(k), e.value(v)
    dtype = dtype_of(query)
    if groups > 1:
        query = e.op("Reshape", query, e.const([0, kv_heads, -1, depth]))
    if scale != 1.0:
        query = e.op("Mul", query, e.const(scale, dtype))
    logits = e.op("MatMul", query, e.op("Transpose", e.cast(key, dtype), perm=[0, 1, 3, 2]))
    logits = e.cast(logits, _FLOAT)
    if softcap is not None:
        cap = e.const(softcap, _FLOAT)
        logits = e.op("Mul", e.op("Tanh", e.op("Div", logits, cap)), cap)
    bias = attention_bias(e, q, k, mask, causal=causal, window=window, aligned_to_end=aligned_to_end)
    alive = None
    if bias is not None:
        if mask is not None:
            best = e.op("ReduceMax", bias, e.const([-1]), keepdims=1)
            alive = e.op("Cast", e.op("Not", e.op("IsInf", best, dtype=ir.DataType.BOOL)), dtype=dtype, to=int(dtype))
            bias = e.op("Max", bias, e.const(_LOWEST, _FLOAT))
        if groups > 1:  # back to one row per query head, where the mask fits
            logits = e.op("Reshape", logits, e.const([0, heads, -1, 0]))
        logits = e.op("Add", logits, bias)
    weights = e.cast(e.op("Softmax", logits, axis=-1), dtype)
    if bias is not None and groups > 1:
        weights = e.op("Reshape", weights, e.const([0, kv_heads, -1, 0]))
    result = e.op("MatMul", weights, e.cast(values, dtype))
    if groups > 1:
        result = e.op("Reshape", result, e.const([0, heads, -1, value_depth]))
    return result if alive is None else e.op("Mul", result, alive)


def attention_bias(
    e: Emitter, q: fx.Node, k: fx.Node, mask: object, *, causal: bool, window: int | None, aligned_to_end: bool
) -> ir.Value | None:
    """What is added to the logits: 0 where a query may attend, else ``-inf`` (without a mask, the lowest float)."""
    allowed = None
    if causal or window is not None:
        queries, keys = e.size(q, 2), e.size(k, 2)
        zero, one = e.const(0), e.const(1)
        key = e.op("Range", zero, e.op("Squeeze", keys, e.const([0])), one)
        query = e.op("Range", zero, e.op("Squeeze", queries, e.const([0])), one)
        if aligned_to_end:
            query = e.op("Add", query, e.op("Sub", keys, queries))
        query = e.op("Unsqueeze", query, e.const([1]))
        if causal:
            allowed = e.op("LessOrEqual", key, query, dtype=ir.DataType.BOOL)
        if window is not None:
            near = e.op("Greater", key, e.op("Sub", query, e.const([window])), dtype=ir.DataType.BOOL)
            allowed = near if allowed is None else e.op("And", allowed, near)
    nothing = e.const(-np.inf if mask is not None else _LOWEST, _FLOAT)
    none = e.const(0.0, _FLOAT)
    if mask is None:
        return None if allowed is None else e.op("Where", allowed, none, nothing, dtype=_FLOAT)
    given = e.value(mask)
    if given.dtype == ir.DataType.BOOL:
        allowed = given if allowed is None else e.op("And", allowed, given)
        return e.op("Where", allowed, none, nothing, dtype=_FLOAT)
    given = e.cast(given, _FLOAT)
    return given if allowed is None else e.op("Where", allowed, given, nothing, dtype=_FLOAT)
