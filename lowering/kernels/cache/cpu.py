"""`decode_attention` on the CPU: codes are widened a chunk of tokens at a time, and only those that are in use."""

from collections.abc import Sequence

import torch
from torch import Tensor

from qcompiler.lowering.kernels.cache.decode_attention import Side

__all__ = ["attend"]

_CHUNK = 1 << 20
"""Codes that are widened at a time: four megabytes in float32; more leave the caches of a core."""


def attend(
    q: Tensor,
    keys: Side,
    values: Side,
    lengths: Sequence[int],
    sm_scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """The operator, of arguments that have been checked.

    Args:
        q: ``[B, Hq, S, D]``.
        keys, values: the cache; packed codes in groups of an even number of channels.
        lengths: one, or one per sequence of the batch.
        sm_scale, window, softcap: as of the operator.

    Returns:
        ``[B, Hq, S, Dv]`` of the dtype of ``q``.
    """
    if len(lengths) == 1:
        return _attend(q, keys, values, lengths[0], sm_scale, window, softcap)
    parts = [
        _attend(q[i : i + 1], _row(keys, i), _row(values, i), length, sm_scale, window, softcap)
        for i, length in enumerate(lengths)
    ]
    return torch.cat(parts) if parts else q.new_empty(*q.shape[:3], values.width)


def _row(side: Side, i: int) -> Side:
    """One sequence of the batch."""

    def cut(tensor: Tensor | None) -> Tensor | None:
        return tensor[i : i + 1] if tensor is not None and side.groups else tensor

    return Side(side.spec, side.codes[i : i + 1], cut(side.scale), cut(side.zero))


def _attend(
    q: Tensor, keys: Side, values: Side, length: int, sm_scale: float, window: int | None, softcap: float | None
) -> Tensor:
    """One length for the batch; scores are whole, codes are widened a chunk of tokens at a time."""
    batch, query_heads, queries, _ = q.shape
    heads = keys.codes.shape[1]
    out = q.new_zeros(batch, heads, query_heads // max(heads, 1) * queries, values.width, dtype=torch.float32)
    first = 0 if window is None else max(0, length - queries - window + 1)
    if length <= first or not out.numel():
        return out.reshape(batch, query_heads, queries, values.width).to(q.dtype)
    rows = q.reshape(batch, heads, -1, keys.width).to(torch.float32) * sm_scale
    scores = rows.new_empty(*rows.shape[:3], length - first)
    step = max(64, _CHUNK // (batch * heads * max(keys.width, values.width)))
    spans = [(at, min(at + step, length)) for at in range(first, length, step)]
    for at, end in spans:
        scores[..., at - first : end - first] = _scores(rows, keys, at, end)
    if softcap is not None:
        scores = scores.div_(softcap).tanh_().mul_(softcap)
    if queries > 1 or window is not None:
        token = torch.arange(first, length)
        query = length - queries + torch.arange(queries)[:, None]
        hidden = token > query
        if window is not None:
            hidden |= token <= query - window
        hidden = hidden.repeat(rows.shape[2] // queries, 1)
        scores = scores.masked_fill_(hidden, -torch.inf)
        weights = scores.softmax(-1).masked_fill_(hidden.all(-1, keepdim=True), 0.0)
    else:
        weights = scores.softmax(-1)
    for at, end in spans:
        out += _mixed(weights[..., at - first : end - first], values, at, end)
    if values.spec is not None and not values.groups:
        out = _unscaled(out, weights, values)
    return out.reshape(batch, query_heads, queries, values.width).to(q.dtype)


def _scores(rows: Tensor, keys: Side, at: int, end: int) -> Tensor:
    """``[B, H, R, tokens]`` of queries ``[B, H, R, D]`` and keys ``at`` to ``end``."""
    if keys.spec is None:
        return rows @ keys.codes[:, :, at:end].to(torch.float32).transpose(-1, -2)
    if not keys.groups:
        assert keys.scale is not None
        rows = rows * keys.scale
    pieces = (rows[..., ::2], rows[..., 1::2]) if keys.spec.is_packed else (rows,)
    products = [piece @ codes.transpose(-1, -2) for piece, codes in zip(pieces, _codes(keys, at, end), strict=True)]
    score = products[0] if len(products) == 1 else products[0].add_(products[1])
    scale, offset = _per_token(keys, at, end)
    if scale is not None:
        score.mul_(scale.transpose(-1, -2))
    if offset is not None:
        score.sub_(rows.unflatten(-1, (keys.groups, -1)).sum(-1) @ offset.transpose(-1, -2))
    elif keys.zero is not None:
        score.sub_((rows * keys.zero).sum(-1, keepdim=True))
    elif keys.spec.is_packed:
        score.sub_(8.0 * rows.sum(-1, keepdim=True))
    return score


def _mixed(weights: Tensor, values: Side, at: int, end: int) -> Tensor:
    """``[B, H, R, Dv]``: values ``at`` to ``end`` added up; in units of the stored scale where there is one."""
    if values.spec is None:
        return weights @ values.codes[:, :, at:end].to(torch.float32)
    scale, offset = _per_token(values, at, end)
    scaled = weights if scale is None else weights * scale.transpose(-1, -2)
    products = [scaled @ codes for codes in _codes(values, at, end)]
    mixed = products[0] if len(products) == 1 else torch.stack(products, dim=-1).flatten(-2)
    if offset is not None:
        mixed.unflatten(-1, (values.groups, -1)).sub_((weights @ offset).unsqueeze(-1))
    return mixed


def _unscaled(out: Tensor, weights: Tensor, values: Side) -> Tensor:
    """Stored scales and zero points, which come last."""
    assert values.spec is not None
    assert values.scale is not None
    if values.zero is not None:
        out = out - weights.sum(-1, keepdim=True) * values.zero
    elif values.spec.is_packed:
        out = out - 8.0 * weights.sum(-1, keepdim=True)
    return out * values.scale


def _codes(side: Side, at: int, end: int) -> tuple[Tensor, ...]:
    """Codes in float32 ``[B, H, tokens, D]``; of packed ones even channels and odd ones apart, as stored.

    With several scales per token, times those: they cannot go anywhere else.
    """
    assert side.spec is not None
    stored, factor = side.codes[:, :, at:end], 1.0
    if side.spec.is_packed:
        widened: tuple[Tensor, ...] = ((stored & 15).to(torch.float32), (stored >> 4).to(torch.float32))
    elif side.spec.is_float and side.groups:
        # E4M3 moved to the top of a float16 is 2^-8 of itself. Not a number becomes one, but then its scale is not.
        bits = stored.view(torch.int8).to(torch.int16).bitwise_left_shift_(7).bitwise_and_(-0x4080)
        widened, factor = (bits.view(torch.float16).to(torch.float32),), 256.0
    else:
        widened = (stored.to(torch.float32),)
    if side.groups > 1:
        assert side.scale is not None
        scale = side.scale[:, :, at:end].to(torch.float32).mul_(factor).unsqueeze(-1)
        for codes in widened:
            codes.unflatten(-1, (side.groups, -1)).mul_(scale)
    elif factor != 1.0:
        widened[0].mul_(factor)
    return widened


def _per_token(side: Side, at: int, end: int) -> tuple[Tensor | None, Tensor | None]:
    """``[B, H, tokens, G]`` in float32: the scale where it is the only one of a token, and zero points times scales."""
    assert side.spec is not None
    if not side.groups:
        return None, None
    assert side.scale is not None
    scale = side.scale[:, :, at:end].to(torch.float32)
    offset: Tensor | None = None
    if side.zero is not None:
        offset = side.zero[:, :, at:end] * scale
    elif side.spec.is_packed:
        offset = 8.0 * scale
    return scale if side.groups == 1 else None, offset
