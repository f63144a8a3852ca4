"""ONNX Runtime's own operators in NumPy, for `onnx.reference`: float16 is evaluated there as accelerators compute it.

Written from the schemas of com.microsoft opset 1; products and softmax are in float32, what comes out is rounded.
Attention is that of a first run: no cache enters.
"""

from typing import Any

import numpy as np
from onnx.reference.op_run import OpRun

from qcompiler.lowering.ort.dialect import DOMAIN

__all__ = ["OPERATORS"]

_HIDDEN = -1e30
_UNUSED = (np.float32(0), np.float32(0))


def _unpacked(data: Any, bits: int) -> Any:
    """Codes along the last axis, low bits first."""
    per_byte = 8 // bits
    shifts = np.arange(per_byte, dtype=np.uint8) * bits
    wide = (data[..., None] >> shifts) & ((1 << bits) - 1)
    return wide.reshape(*data.shape[:-1], -1).astype(np.float32)


def _dequantized(data: Any, scales: Any, zero_points: Any, bits: int, block: int, width: int) -> Any:
    """float32 ``[rows, width]``."""
    rows, blocks = scales.shape
    codes = _unpacked(data.reshape(rows, -1), bits)
    zero: Any = np.float32(1 << (bits - 1))
    if zero_points is not None:
        zero = np.repeat(_unpacked(zero_points.reshape(rows, -1), bits)[:, :blocks], block, 1)
    return ((codes - zero) * np.repeat(scales.astype(np.float32), block, 1))[:, :width]


class MatMulNBits(OpRun):
    """A product with dequantized codes."""

    op_domain = DOMAIN

    def _run(
        self,
        a: Any,
        b: Any,
        scales: Any,
        zero_points: Any = None,
        g_idx: Any = None,
        bias: Any = None,
        *,
        K: Any = None,
        N: Any = None,
        bits: Any = None,
        block_size: Any = None,
        accuracy_level: Any = None,
    ) -> tuple[Any]:
        weight = _dequantized(b, scales, zero_points, bits, block_size, K)
        result = a.astype(np.float32) @ weight.astype(a.dtype).astype(np.float32).T
        if bias is not None:
            result = result + bias.astype(np.float32)
        return (result.astype(a.dtype),)


class GatherBlockQuantized(OpRun):
    """Rows of a table, dequantized."""

    op_domain = DOMAIN

    def _run(
        self,
        data: Any,
        indices: Any,
        scales: Any,
        zero_points: Any = None,
        *,
        bits: Any = None,
        block_size: Any = None,
        gather_axis: Any = None,
        quantize_axis: Any = None,
    ) -> tuple[Any]:
        flat = indices.reshape(-1)
        zero = None if zero_points is None else zero_points[flat]
        width = data.shape[1] * 8 // bits
        rows = _dequantized(data[flat], scales[flat], zero, bits, block_size, width)
        return (rows.reshape(*indices.shape, width).astype(scales.dtype),)


class SkipSimplifiedLayerNormalization(OpRun):
    """The root mean square norm of a sum, and the sum."""

    op_domain = DOMAIN

    def _run(self, x: Any, skip: Any, gamma: Any, bias: Any = None, *, epsilon: Any = None) -> tuple[Any, ...]:
        total = x + skip
        wide = total.astype(np.float32)
        root = np.sqrt((wide * wide).mean(-1, keepdims=True) + epsilon)
        return (wide / root * gamma.astype(np.float32)).astype(x.dtype), *_UNUSED, total


class SkipLayerNormalization(OpRun):
    """The norm of a sum, and the sum."""

    op_domain = DOMAIN

    def _run(
        self, x: Any, skip: Any, gamma: Any, beta: Any = None, bias: Any = None, *, epsilon: Any = None
    ) -> tuple[Any, ...]:
        total = x + skip
        wide = total.astype(np.float32)
        centred = wide - wide.mean(-1, keepdims=True)
        normed = centred / np.sqrt((centred * centred).mean(-1, keepdims=True) + epsilon) * gamma.astype(np.float32)
        shift = 0.0 if beta is None else beta.astype(np.float32)
        return (normed + shift).astype(x.dtype), *_UNUSED, total


def _rotated(x: Any, cos: Any, sin: Any, interleaved: int) -> Any:
    """``[B, N, S, H]`` by ``[B or 1, 1, S, H / 2]``, in float32."""
    x, cos, sin = (part.astype(np.float32) for part in (x, cos, sin))
    half = cos.shape[-1]
    first, second = (x[..., ::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])
    turned = first * cos - second * sin, second * cos + first * sin
    return np.stack(turned, -1).reshape(x.shape) if interleaved else np.concatenate(turned, -1)


class RotaryEmbedding(OpRun):
    """Rows of tables by positions."""

    op_domain = DOMAIN

    def _run(self, x: Any, positions: Any, cos: Any, sin: Any, *, interleaved: Any = None) -> tuple[Any]:
        return (_rotated(x, cos[positions][:, None], sin[positions][:, None], interleaved).astype(x.dtype),)


class GroupQueryAttention(OpRun):
    """Causal attention of a first run; codes of a quantized cache are those of its scales."""

    op_domain = DOMAIN

    def _run(self, *inputs: Any, **options: Any) -> tuple[Any, ...]:
        values = [*inputs, *[None] * (14 - len(inputs))]
        query, key, value, past, _, lengths = values[:6]
        cos, sin, key_scale, value_scale = values[7], values[8], values[12], values[13]
        heads, kv_heads, dtype = options["num_heads"], options["kv_num_heads"], query.dtype
        if key is None:
            width = query.shape[-1] // (heads + 2 * kv_heads)
            query, key, value = np.split(query, [heads * width, (heads + kv_heads) * width], -1)
        batch, length, _ = query.shape
        q, k, v = (
            part.reshape(batch, length, count, -1).transpose(0, 2, 1, 3)
            for part, count in ((query, heads), (key, kv_heads), (value, kv_heads))
        )
        if options["do_rotary"]:
            tables = (cos[None, None, :length], sin[None, None, :length], options["rotary_interleaved"])
            q, k = (_rotated(part, *tables).astype(dtype) for part in (q, k))
        bits = options.get("kv_cache_bit_width")
        kept = [_kept(part, scale, bits, past.dtype) for part, scale in ((k, key_scale), (v, value_scale))]
        k, v = (np.repeat(part, heads // kv_heads, 1).astype(np.float32) for _, part in kept)
        logits = q.astype(np.float32) @ k.transpose(0, 1, 3, 2) * options["scale"]
        if options.get("softcap"):
            logits = options["softcap"] * np.tanh(logits / options["softcap"])
        place = np.arange(length)
        seen = place <= place[:, None]
        if options["local_window_size"] > 0:
            seen &= place > place[:, None] - options["local_window_size"]
        seen = seen & (place <= lengths.reshape(-1, 1, 1, 1))
        weights = np.exp(np.where(seen, logits, _HIDDEN) - np.where(seen, logits, _HIDDEN).max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        result = (weights @ v).transpose(0, 2, 1, 3).reshape(batch, length, -1)
        return result.astype(dtype), kept[0][0], kept[1][0]


def _kept(x: Any, scale: Any, bits: int | None, dtype: Any) -> tuple[Any, Any]:
    """What is kept of keys or values, and what attention reads of it."""
    if bits is None or scale is None:
        return x, x
    most = (1 << (bits - 1)) - 1
    codes = np.clip(np.rint(x.astype(np.float32) / scale), -most - 1, most)
    if bits == 8:
        return codes.astype(dtype), codes * scale
    moved = (codes + 8).astype(np.uint8)
    return moved[..., ::2] | (moved[..., 1::2] << 4), codes * scale


OPERATORS = (
    GatherBlockQuantized,
    GroupQueryAttention,
    MatMulNBits,
    RotaryEmbedding,
    SkipLayerNormalization,
    SkipSimplifiedLayerNormalization,
)
"""Classes that `onnx.reference.ReferenceEvaluator` takes as ``new_ops``."""
