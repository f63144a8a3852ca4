"""Attention and rotary embeddings. Source: onnx/docs/Operators.md, onnxruntime/docs/ContribOperators.md."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qcompiler.frontend.onnx.call import Call, Operators
from qcompiler.frontend.onnx.values import Unsupported, Value

__all__ = ["ATTENTION", "CONTRIB_ATTENTION"]


def _heads(x: Tensor, count: int | None) -> Tensor:
    """``[B, S, H * D]`` → ``[B, H, S, D]``."""
    if x.dim() == 4:
        return x
    if not count:
        raise Unsupported("three dimensions without a number of heads")
    batch, length, width = x.shape
    return x.reshape(batch, length, count, width // count).permute([0, 2, 1, 3])


def _together(x: Tensor) -> Tensor:
    """``[B, H, S, D]`` → ``[B, S, H * D]``."""
    batch, heads, length, width = x.shape
    return x.permute([0, 2, 1, 3]).reshape(batch, length, heads * width)


def _append(past: Tensor | None, new: Tensor) -> Tensor:
    return new if past is None else torch.cat([past, new], 2)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, causal: bool, **options: Any
) -> Tensor:
    if scale is None:
        scale = float(q.shape[-1]) ** -0.5
    if mask is not None and mask.dim() < 4:
        mask = mask.reshape([1] * (4 - mask.dim()) + list(mask.shape))
    if not causal and not options:  # as models call it: its mask may be one of a known form
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
    window, softcap = options.get("window"), options.get("softcap")
    return torch.ops.qcompiler.attention(q, k, v, mask, scale, causal, window, softcap)  # type: ignore[no-any-return]


def _attention(call: Call) -> Value | tuple[Value | None, ...]:
    """Attention of opset 23 and 24."""
    if call.optional(6) is not None:
        raise Unsupported("lengths of keys as an input")
    if call.outputs > 3:
        raise Unsupported("the products of queries and keys as an output")
    joined = call.tensor(0).dim() == 3
    q = _heads(call.tensor(0), call.get("q_num_heads"))
    k, v = (_heads(call.tensor(index), call.get("kv_num_heads")) for index in (1, 2))
    past = call.optional_tensor(4)
    k, v = _append(past, k), _append(call.optional_tensor(5), v)
    causal, mask = bool(call.get("is_causal", 0)), call.optional_tensor(3)
    if causal and past is None and q.shape[2] != k.shape[2]:
        raise Unsupported("a causal mask that counts from the first of more keys than queries")
    options = {"softcap": float(call.get("softcap"))} if call.get("softcap", 0.0) else {}
    result = _attend(q, k, v, mask, call.get("scale"), causal, **options)
    return (_together(result) if joined else result, k, v)


def _turned(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool, width: int) -> Tensor:
    """The first ``width`` elements of heads rotated, by cosines ``[B or 1, S, width / 2]``.

    Args:
        x: ``[B, H, S, D]``.
        cos, sin: as above.
        interleaved: pairs stand side by side.
        width: 0 for all.
    """
    wide = [torch.repeat_interleave(t, 2, -1) if interleaved else torch.cat([t, t], -1) for t in (cos, sin)]
    cos, sin = (t.unsqueeze(1) for t in wide)
    if not width or width == x.shape[-1]:
        return torch.ops.qcompiler.rotary(x, cos, sin, interleaved)  # type: ignore[no-any-return]
    turned = torch.ops.qcompiler.rotary(x[..., :width], cos, sin, interleaved)
    return torch.cat([turned, x[..., width:]], -1)


def _looked_up(table: Tensor, places: Tensor) -> Tensor:
    return torch.nn.functional.embedding(places, table)


def _rotary(call: Call) -> Value:
    """RotaryEmbedding of opset 23: X, cos, sin, positions."""
    return _rotated(call, call.tensor(0), call.tensor(1), call.tensor(2), call.optional_tensor(3))


def _contrib_rotary(call: Call) -> Value:
    """That of ONNX Runtime: X, positions, cos, sin."""
    call.refuse(is_packed_batching=0, scale=1.0)
    positions, x = call.tensor(1), call.tensor(0)
    if positions.dim() == 1:  # the first, others behind it
        length = x.shape[2] if x.dim() == 4 else x.shape[1]
        positions = positions.reshape([1, 1]) + torch.arange(length, device=call.device)
    return _rotated(call, x, call.tensor(2), call.tensor(3), positions)


def _rotated(call: Call, x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None) -> Tensor:
    width = call.get("rotary_embedding_dim", 0)
    joined, heads = x.dim() == 3, call.get("num_heads", 0)
    if joined and not heads:
        heads = x.shape[2] // (width or 2 * cos.shape[-1])
    if positions is not None:
        cos, sin = _looked_up(cos, positions), _looked_up(sin, positions)
    turned = _turned(_heads(x, heads), cos, sin, interleaved=bool(call.get("interleaved", 0)), width=width)
    return _together(turned) if joined else turned


def _grouped(call: Call) -> tuple[Value | None, ...]:
    """GroupQueryAttention: causal; keys of a sequence end at its length."""
    call.refuse(
        k_quant_type="NONE", v_quant_type="NONE", smooth_softmax=0, causal=1, qk_output=0, sliding_window_cache=0
    )
    for index in (11, 12, 13, 14, 15, 16):
        if call.optional(index) is not None:
            raise Unsupported(f"input {index}")
    heads, shared = call.get("num_heads"), call.get("kv_num_heads")
    if call.optional(1) is None:  # packed
        packed = call.tensor(0)
        width = packed.shape[2] // (heads + 2 * shared)
        q, k, v = torch.split(packed, [heads * width, shared * width, shared * width], 2)
    else:
        q, k, v = (call.tensor(index) for index in range(3))
    q, k, v = _heads(q, heads), _heads(k, shared), _heads(v, shared)
    length, lengths = q.shape[2], call.tensor(5).reshape([-1, 1]).long() + 1
    if call.get("do_rotary", 0):
        positions = call.optional_tensor(9)
        if positions is None:
            positions = lengths - length + torch.arange(length, device=call.device)
        cos, sin = (_looked_up(call.tensor(index), positions) for index in (7, 8))
        interleaved, turned = bool(call.get("rotary_interleaved", 0)), 2 * cos.shape[-1]
        q, k = (_turned(x, cos, sin, interleaved=interleaved, width=turned) for x in (q, k))
    k, v = _append(call.optional_tensor(3), k), _append(call.optional_tensor(4), v)
    mask = (torch.arange(k.shape[2], device=call.device) < lengths).unsqueeze(1).unsqueeze(1)
    added = call.optional_tensor(10)
    if added is not None:
        mask = torch.where(mask, added, float("-inf"))
    window, softcap = call.get("local_window_size", -1), call.get("softcap", 0.0)
    options = {"window": window if window > 0 else None, "softcap": softcap or None}
    result = _attend(q, k, v, mask, call.get("scale") or None, True, **options)
    return _together(result), k, v


def _multi_head(call: Call) -> tuple[Value | None, ...]:
    """MultiHeadAttention of ONNX Runtime: query, key, value, bias, padding of keys, added mask, past."""
    heads = call.get("num_heads")
    if call.optional(1) is None or call.optional(2) is None or call.tensor(0).dim() != 3:
        raise Unsupported("packed queries, keys and values")
    if call.outputs > 3 or any(call.optional(index) is not None for index in (8, 9)):
        raise Unsupported("shared buffers")
    parts: Sequence[Tensor] = [call.tensor(index) for index in range(3)]
    bias = call.optional_tensor(3)
    if bias is not None:
        sizes = [part.shape[-1] if part.dim() == 3 else part.shape[1] * part.shape[3] for part in parts]
        shifts = torch.split(bias, sizes)
        parts = [part + shift if part.dim() == 3 else part for part, shift in zip(parts, shifts, strict=True)]
    q, k, v = (_heads(part, heads) for part in parts)
    k, v = _append(call.optional_tensor(6), k), _append(call.optional_tensor(7), v)
    mask, padding = call.optional_tensor(5), call.optional_tensor(4)
    if padding is not None:
        if padding.dim() != 2:
            raise Unsupported("a padding mask of another shape than [batch, keys]")
        keep = padding.to(torch.bool).unsqueeze(1).unsqueeze(1)
        mask = keep if mask is None else torch.where(keep, mask, float("-inf"))
    causal = bool(call.get("unidirectional", 0))
    return _together(_attend(q, k, v, mask, call.get("scale") or None, causal)), k, v


ATTENTION: Operators = {"Attention": _attention, "RotaryEmbedding": _rotary}
CONTRIB_ATTENTION: Operators = {
    "GroupQueryAttention": _grouped,
    "MultiHeadAttention": _multi_head,
    "RotaryEmbedding": _contrib_rotary,
}
