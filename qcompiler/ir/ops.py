"""The canonical operators, ``torch.ops.qcompiler.*``: what a captured graph is rewritten to and every lowering reads.

Each is defined once, as its reference arithmetic, composed of differentiable torch operators: shapes under fake
tensors, autograd and any device follow from that. Faster kernels register themselves for a device and must agree with
it.

| operator | meaning |
|---|---|
| ``linear(x, weight, bias?)`` | ``x @ weight.T + bias``; weight ``[out, in]`` |
| ``rms_norm(x, weight, eps)`` | ``x / sqrt(mean(x^2) + eps) * weight``, last axis (arXiv 1910.07467) |
| ``layer_norm(x, weight?, bias?, eps)`` | mean and variance over the last axis (arXiv 1607.06450) |
| ``rotary(x, cos, sin, interleaved)`` | rotary embedding of ``x[..., D]``; cos, sin broadcast (arXiv 2104.09864) |
| ``kv_append(past, new)`` | ``[B, H, P, D]`` and ``[B, H, S, D]`` → ``[B, H, P + S, D]`` |
| ``attention(q, k, v, mask?, scale, causal, window?, softcap?)`` | softmax attention, grouped heads; `_attention` |
| ``take_expert(x, experts, index)`` | the rows of ``x[S, D]`` that go to one expert; `_take_expert` |
| ``merge_experts(rows, experts)`` | the rows of all experts back in their places |
| ``hadamard(x, block)`` | every ``block`` elements of the last axis times an orthogonal matrix |
| ``quantize(x, scale, zero_point?, axis, block, dtype, bits)`` | ONNX QuantizeLinear |
| ``dequantize(codes, scale, zero_point?, axis, block, out_dtype)`` | ONNX DequantizeLinear |
| ``fp4_scale(x, factor?, block, floor)`` | the one-byte scales that blocks of ``x`` have; `fp4.block_scale` |
| ``fp4_quantize(x, scale, factor?, block)`` | 4-bit float codes, scales per block of the last axis |
| ``fp4_dequantize(codes, scale, factor?, block)`` | float32 ``code * (scale * factor)`` |
| ``codebook_dequantize(codes, table)`` | ``[out, in]`` codes, each a place in its row of ``table[out, levels]`` |
| ``sparse_add(w, values, columns, row_offsets)`` | a matrix plus a sparse one of its shape (CSR); `_sparse_add` |
| ``choose_qparams(x, dtype, axis?, bits, clip, block)`` | ``(scale, zero_point)`` of ``x``; `_choose_qparams` |
| ``choose_block_qparams(x, dtype, block, bits)`` | the same of every ``block`` elements; `_choose_block_qparams` |
| ``pack_nibbles(codes)``, ``unpack_nibbles(packed, signed)`` | two 4-bit codes in a byte; `_pack_nibbles` |

For quantize and dequantize, a 0-D scale is per tensor; a 1-D one per slice of ``axis`` (``block`` 0); one of the rank
of the data is blocked, ``block`` elements of ``axis`` sharing a scale, the last block possibly short; along other axes
where it has one element, all share it; a matrix may have one per square of ``block`` rows and columns. Codes are int8,
uint8, or float8 (E4M3 without infinities, E5M2), which has no zero point and saturates at its largest finite number.
Integer codes of fewer than 8 ``bits`` are held in int8 and uint8, too.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from qcompiler.numerics import fp4, multiply

__all__ = ["CANONICAL"]

_LIBRARY = torch.library.Library("qcompiler", "DEF")

CANONICAL = (
    "linear",
    "rms_norm",
    "layer_norm",
    "rotary",
    "kv_append",
    "attention",
    "take_expert",
    "merge_experts",
    "hadamard",
    "quantize",
    "dequantize",
    "choose_qparams",
    "choose_block_qparams",
    "pack_nibbles",
    "unpack_nibbles",
    "fp4_scale",
    "fp4_quantize",
    "fp4_dequantize",
    "codebook_dequantize",
    "sparse_add",
)

_FLOAT_MAX = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}
_SMALLEST_SCALE = 2.0**-23  # of dynamic ranges; positive in float16 too


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(x, weight, bias)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps) * weight).to(x.dtype)


def _layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def _rotary(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    if interleaved:
        rotated = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    else:
        half = x.shape[-1] // 2
        rotated = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return x * cos + rotated * sin


def _kv_append(past: Tensor, new: Tensor) -> Tensor:
    return torch.cat((past, new), dim=2) if past.shape[2] else new


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    causal: bool,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Softmax attention.

    Args:
        q, k, v: ``[B, Hq, S, D]``, ``[B, Hkv, T, D]``, ``[B, Hkv, T, Dv]``, Hq a multiple of Hkv; query head h reads
            key head ``h * Hkv // Hq``.
        mask: boolean (True: attend) or additive, broadcastable to ``[B, Hq, S, T]``; combined with ``causal``.
        scale: factor of ``q @ k.T``.
        causal: query ``s`` sees keys ``0 .. T - S + s`` (aligned to the end, so a cache just makes T longer).
        window: with causal, only the last ``window`` of them.
        softcap: ``c * tanh(logits / c)`` before masking.

    Returns:
        ``[B, Hq, S, Dv]``; a row that may attend to nothing gives zeros.
    """
    queries, keys = q.shape[2], k.shape[2]
    repeats = q.shape[1] != k.shape[1]
    if softcap is None and window is None and causal and queries == keys and _attends_everywhere(mask):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=repeats)
    if (causal and queries > 1) or window is not None:
        key = torch.arange(keys, device=q.device)
        query = torch.arange(queries, device=q.device)[:, None] + (keys - queries)
        allowed = key <= query
        if window is not None:
            allowed = allowed & (key > query - window)
        if mask is None:
            mask = allowed
        elif mask.dtype == torch.bool:
            mask = mask & allowed
        else:
            mask = mask.masked_fill(~allowed, float("-inf"))
    if softcap is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=repeats)
    if repeats:
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    logits = softcap * torch.tanh(q @ k.transpose(-1, -2) * (scale / softcap))
    if mask is not None:
        logits = logits.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else logits + mask
    weights = torch.softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    return torch.nan_to_num(weights).to(v.dtype) @ v


def _attends_everywhere(mask: Tensor | None) -> bool:
    """Whether a mask hides nothing; looked at only where a look is free of cost (a small boolean mask on the CPU)."""
    if mask is None:
        return True
    is_cheap = type(mask) is Tensor and mask.device.type == "cpu" and mask.dtype == torch.bool and mask.shape[-2] == 1
    return is_cheap and bool(mask.all())


def _take_expert(x: Tensor, experts: Tensor, index: int) -> Tensor:
    """``x[experts == index]``: the rows one expert works on, in their order.

    Args:
        x: ``[S, D]``, one row per token and chosen expert.
        experts: int64 ``[S]``, which expert each row goes to.
        index: of the expert.

    Returns:
        ``[n, D]``, n being how often ``index`` occurs, possibly 0.
    """
    return x.index_select(0, (experts == index).nonzero().squeeze(1))


def _merge_experts(rows: list[Tensor], experts: Tensor) -> Tensor:
    """The inverse of `_take_expert` for all experts at once.

    Args:
        rows: for each expert, ``[n, D]``.
        experts: int64 ``[S]``, which expert each row came from; rows of other numbers are zero.

    Returns:
        ``[S, D]``.
    """
    places = torch.cat([(experts == index).nonzero().squeeze(1) for index in range(len(rows))])
    merged = torch.cat(rows)
    return merged.new_zeros(experts.shape[0], merged.shape[1]).index_copy(0, places, merged)


def _broadcast(qparam: Tensor, data: Tensor, axis: int, block: int) -> Tensor:
    axis = axis % data.dim() if data.dim() else 0
    if qparam.dim() == 0:
        return qparam
    if block == 0:
        return qparam.reshape([-1 if i == axis else 1 for i in range(data.dim())])
    if data.dim() == 2 and qparam.shape[1 - axis] not in (1, data.shape[1 - axis]):
        qparam = qparam.repeat_interleave(block, dim=1 - axis).narrow(1 - axis, 0, data.shape[1 - axis])
    if qparam.shape[axis] == 1:
        return qparam
    return qparam.repeat_interleave(block, dim=axis).narrow(axis, 0, data.shape[axis])


def _quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, axis: int, block: int, dtype: torch.dtype, bits: int = 8
) -> Tensor:
    values = x / _broadcast(scale, x, axis, block)
    if dtype in _FLOAT_MAX:
        return values.clamp(-_FLOAT_MAX[dtype], _FLOAT_MAX[dtype]).to(dtype)
    low, high = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if dtype == torch.int8 else (0, (1 << bits) - 1)
    codes = torch.round(values)
    if zero_point is not None:
        codes = codes + _broadcast(zero_point, x, axis, block)
    return codes.clamp(low, high).to(dtype)


def _dequantize(
    codes: Tensor, scale: Tensor, zero_point: Tensor | None, axis: int, block: int, out_dtype: torch.dtype
) -> Tensor:
    values = codes.to(scale.dtype)
    if zero_point is not None:
        values = values - _broadcast(zero_point, codes, axis, block).to(scale.dtype)
    return (values * _broadcast(scale, codes, axis, block)).to(out_dtype)


def _choose_qparams(
    x: Tensor, dtype: torch.dtype, axis: int | None = None, bits: int = 8, clip: float = 1.0, block: int = 0
) -> tuple[Tensor, Tensor]:
    """The scale and zero point at which codes just cover a tensor, or each slice of it, or blocks of its last axis.

    int8: ``amax / (2^(bits-1) - 0.5)``; float8: ``amax`` divided by the largest code; uint8: the range widened to hold
    zero, ``(max - min) / (2^bits - 1)`` and ``round(-min / scale)``, as ONNX DynamicQuantizeLinear has it. No scale is
    smaller than 2^-23, so that zeros give zeros.

    Args:
        x: floating point.
        dtype: of the codes.
        axis: reduced, one scale for each slice along it (-1: per token); None: one for all.
        bits: of integer codes.
        clip: the share of the range that is covered; what lies beyond is clamped.
        block: elements of the last axis that share a scale, the last block being short where that does not divide it;
            for codes that are symmetric. 0: the whole axis does.

    Returns:
        Scale of the dtype of ``x`` and zero point of the codes' (0 but for uint8): 0-D, or the shape of ``x`` with one
        element along ``axis``, or for each block of it.
    """
    if block:
        blocks = F.pad(x, (0, -x.shape[-1] % block)).unflatten(-1, (-1, block))
        scale, zero = _choose_qparams(blocks, dtype, -1, bits, clip)
        return scale.squeeze(-1), zero.squeeze(-1)
    axes = list(range(x.dim())) if axis is None else [axis]
    keep = axis is not None
    if dtype == torch.uint8:
        low = x.amin(axes, keepdim=keep).clamp(max=0) * clip
        high = x.amax(axes, keepdim=keep).clamp(min=0) * clip
        largest = (1 << bits) - 1
        scale = ((high - low) / largest).clamp(min=_SMALLEST_SCALE)
        return scale, torch.round(-low / scale).clamp(0, largest).to(dtype)
    reach = _FLOAT_MAX.get(dtype, (1 << (bits - 1)) - 0.5)
    scale = (x.abs().amax(axes, keepdim=keep) * clip / reach).clamp(min=_SMALLEST_SCALE)
    return scale, torch.zeros_like(scale).to(dtype)


def _choose_block_qparams(x: Tensor, dtype: torch.dtype, block: int, bits: int = 8) -> tuple[Tensor, Tensor]:
    """The scale and zero point at which codes just cover every ``block`` elements of the last axis.

    int8: ``amax / (2^(bits-1) - 1)``; float8: ``amax`` divided by the largest code; uint8: the range widened to hold
    zero, ``(max - min) / (2^bits - 1)`` and ``round(-min / scale)``. Scales are rounded to float16 before anything is
    computed from them, and lie between 2^-23 and its largest number.

    Args:
        x: floating point ``[..., n]``, n a multiple of ``block``.
        dtype: of the codes.
        block: elements that share a scale.
        bits: of integer codes.

    Returns:
        Scale, float16 ``[..., n / block]``, and zero point of the codes' dtype (0 but for uint8), of the same shape.
    """
    blocks = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (-1, block))
    most = torch.finfo(torch.float16).max
    if dtype == torch.uint8:
        low, high = blocks.amin(-1).clamp(max=0), blocks.amax(-1).clamp(min=0)
        largest = (1 << bits) - 1
        scale = ((high - low) / largest).clamp(_SMALLEST_SCALE, most).to(torch.float16)
        return scale, torch.round(-low / scale).clamp(0, largest).to(dtype)
    reach = _FLOAT_MAX.get(dtype, (1 << (bits - 1)) - 1)
    scale = (blocks.abs().amax(-1) / reach).clamp(_SMALLEST_SCALE, most).to(torch.float16)
    return scale, torch.zeros_like(scale).to(dtype)


def _pack_nibbles(codes: Tensor) -> Tensor:
    """Two codes of 4 bits per byte, the first in the low nibble; signed ones are stored as ``code + 8``.

    Args:
        codes: ``[..., n]``, n even: int8 in -8 .. 7, or uint8 in 0 .. 15.

    Returns:
        uint8 ``[..., n / 2]``.
    """
    unsigned = (codes + 8).to(torch.uint8) if codes.dtype == torch.int8 else codes
    return unsigned[..., ::2] | (unsigned[..., 1::2] << 4)


def _unpack_nibbles(packed: Tensor, signed: bool) -> Tensor:
    """The inverse of `_pack_nibbles`: int8 (signed) or uint8 ``[..., 2 n]`` of uint8 ``[..., n]``."""
    codes = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)
    return codes.to(torch.int8) - 8 if signed else codes


def _fp4_scale(x: Tensor, factor: Tensor | None, block: int, floor: bool) -> Tensor:
    blocks = F.pad(x.abs(), (0, -x.shape[-1] % block)).unflatten(-1, (-1, block))
    return fp4.block_scale(blocks.amax(-1), factor, floor=floor)


def _fp4_elements(scale: Tensor, factor: Tensor | None, block: int, width: int) -> Tensor:
    """The float32 scale of every element along the last axis."""
    return fp4.decode_scale(scale, factor).repeat_interleave(block, dim=-1).narrow(-1, 0, width)


def _fp4_quantize(x: Tensor, scale: Tensor, factor: Tensor | None, block: int) -> Tensor:
    return fp4.encode(x / _fp4_elements(scale, factor, block, x.shape[-1]))


def _fp4_dequantize(codes: Tensor, scale: Tensor, factor: Tensor | None, block: int) -> Tensor:
    return fp4.decode(codes) * _fp4_elements(scale, factor, block, codes.shape[-1])


def _codebook_dequantize(codes: Tensor, table: Tensor) -> Tensor:
    rows, levels = table.shape
    first = torch.arange(rows, dtype=torch.int32, device=table.device)[:, None] * levels
    return table.reshape(-1).index_select(0, (codes + first).reshape(-1)).reshape(codes.shape)


def _sparse_add(w: Tensor, values: Tensor, columns: Tensor, row_offsets: Tensor) -> Tensor:
    """``w`` plus a sparse matrix in compressed rows.

    Args:
        w: float ``[out, in]``.
        values: float ``[n]``, row by row.
        columns: int32 ``[n]``, the column of each value.
        row_offsets: int32 ``[out + 1]``: row ``r`` has the values ``row_offsets[r]`` to ``row_offsets[r + 1] - 1``.

    Returns:
        ``[out, in]``.
    """
    counts = row_offsets[1:] - row_offsets[:-1]
    rows = torch.arange(w.shape[0], device=w.device).repeat_interleave(counts, output_size=values.shape[0])
    return w.index_put((rows, columns.long()), values.to(w.dtype), accumulate=True)


for _schema, _reference in (
    ("linear(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor", _linear),
    ("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor", _rms_norm),
    ("layer_norm(Tensor x, Tensor? weight, Tensor? bias, float eps) -> Tensor", _layer_norm),
    ("rotary(Tensor x, Tensor cos, Tensor sin, bool interleaved) -> Tensor", _rotary),
    ("kv_append(Tensor past, Tensor new) -> Tensor", _kv_append),
    (
        "attention(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale, bool causal, int? window=None, "
        "float? softcap=None) -> Tensor",
        _attention,
    ),
    ("take_expert(Tensor x, Tensor experts, int index) -> Tensor", _take_expert),
    ("merge_experts(Tensor[] rows, Tensor experts) -> Tensor", _merge_experts),
    ("hadamard(Tensor x, int block) -> Tensor", multiply),
    (
        "quantize(Tensor x, Tensor scale, Tensor? zero_point, int axis, int block, ScalarType dtype, int bits=8) "
        "-> Tensor",
        _quantize,
    ),
    (
        "dequantize(Tensor codes, Tensor scale, Tensor? zero_point, int axis, int block, ScalarType out_dtype) "
        "-> Tensor",
        _dequantize,
    ),
    ("fp4_scale(Tensor x, Tensor? factor, int block, bool floor) -> Tensor", _fp4_scale),
    ("fp4_quantize(Tensor x, Tensor scale, Tensor? factor, int block) -> Tensor", _fp4_quantize),
    ("fp4_dequantize(Tensor codes, Tensor scale, Tensor? factor, int block) -> Tensor", _fp4_dequantize),
    ("codebook_dequantize(Tensor codes, Tensor table) -> Tensor", _codebook_dequantize),
    ("sparse_add(Tensor w, Tensor values, Tensor columns, Tensor row_offsets) -> Tensor", _sparse_add),
    (
        "choose_qparams(Tensor x, ScalarType dtype, int? axis=None, int bits=8, float clip=1.0, int block=0) "
        "-> (Tensor, Tensor)",
        _choose_qparams,
    ),
    (
        "choose_block_qparams(Tensor x, ScalarType dtype, int block, int bits=8) -> (Tensor, Tensor)",
        _choose_block_qparams,
    ),
    ("pack_nibbles(Tensor codes) -> Tensor", _pack_nibbles),
    ("unpack_nibbles(Tensor packed, bool signed) -> Tensor", _unpack_nibbles),
):
    _LIBRARY.define(_schema)
    _LIBRARY.impl(_schema.split("(")[0], _reference, "CompositeImplicitAutograd")
