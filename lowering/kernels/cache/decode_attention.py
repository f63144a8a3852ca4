"""Attention of a few new tokens over a cache of codes that is never dequantized as a whole.

A scale per token multiplies a column of the scores (keys) or a probability (values), a zero point adds one number per
column or row; a scale per channel goes into the query (keys) or the result (values). So the products are of queries
and codes as they are:

    score[r, t] = k_scale[t] * (sum_d q[r, d] * k_code[t, d]  -  k_zero[t] * sum_d q[r, d])
    out[r, d]   = sum_t (p[r, t] * v_scale[t]) * (v_code[t, d] - v_zero[t])

With scales per group of channels the same holds in each group. ``length`` lies on the device and caches are longer
than it: what they hold behind it is not read into any result.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from qcompiler.errors import InputError
from qcompiler.ir import CacheFormat
from qcompiler.lowering.kernels.cache.append import format_of, position_error
from qcompiler.lowering.kernels.launch import library
from qcompiler.lowering.kernels.launch.device import Choice, Device

__all__ = ["MOST_QUERIES", "Side", "choose", "decode_attention_reference"]

_canonical = torch.ops.qcompiler
MOST_QUERIES = 16
"""New tokens that one launch takes; more attend in float, ahead of the cache."""


def choose(
    keys: CacheFormat | None, values: CacheFormat | None, width: int, device: Device, dtype: torch.dtype
) -> Choice:
    """The implementation of attention over a cache.

    Args:
        keys, values: the formats; None for a side in float, of ``dtype``.
        width: channels of a head.
        device: it lies on.
        dtype: of the queries.
    """
    for spec in (keys, values):
        if spec is not None and spec.is_packed and spec.scales == "per_token" and spec.block(width) % 2:
            return Choice("reference", f"groups of {spec.block(width)} channels split a byte of two codes")
    if device.kind == "cpu":
        return Choice("cpu")
    if device.kind != "cuda":
        return Choice("reference", f"no kernel for devices of kind {device.kind}")
    if not device.has_triton:
        return Choice("reference", "Triton is not installed")
    if device.capability < 80:
        return Choice("reference", f"compute capability {device.capability} is below 80")
    if dtype not in (torch.float16, torch.bfloat16):
        return Choice("reference", f"queries in {str(dtype).removeprefix('torch.')}, kernels take 16 bits")
    if width > 256:
        return Choice("reference", f"heads of {width} channels are wider than 256")
    for spec in (keys, values):
        reason = None if spec is None else _unfit_words(spec, width)
        if reason is not None:
            return Choice("reference", reason)
    return Choice("triton")


def _unfit_words(spec: CacheFormat, width: int) -> str | None:
    """Why a head cannot be read as 16-bit words of whole codes that share their scales; None if it can."""
    per_word = 4 if spec.is_packed else 2
    block = spec.block(width)
    if width % per_word:
        return f"heads of {width} channels are no multiple of the {per_word} codes in a word"
    if spec.scales == "per_token" and block < width and (block % per_word or block & (block - 1)):
        return f"groups of {block} channels are no power of two, or less than the {per_word} codes in a word"
    return None


@dataclass(frozen=True)
class Side:
    """The keys, or the values, as the operator is given them.

    Attributes:
        spec: the format; None in float.
        codes: ``[B, H, capacity, D]`` (``D / 2`` bytes for two codes each).
        scale: float16 ``[B, H, capacity, G]``; or stored, float32, 0-D or ``[1, H, 1, D]``; None in float.
        zero: uint8, as the scale; None where symmetric.
    """

    spec: CacheFormat | None
    codes: Tensor
    scale: Tensor | None
    zero: Tensor | None

    @property
    def width(self) -> int:
        """Channels of a head."""
        return self.codes.shape[3] * (2 if self.spec is not None and self.spec.is_packed else 1)

    @property
    def groups(self) -> int:
        """Scales per token and head; 0 where scales are stored or there are none."""
        per_token = self.spec is not None and self.spec.scales == "per_token"
        return self.scale.shape[3] if per_token and self.scale is not None else 0

    @classmethod
    def of(cls, name: str, codes: Tensor, scale: Tensor | None, zero: Tensor | None, dtype: str) -> "Side":
        """Recognises the form of the scales by their shape, and refuses what does not fit.

        Args:
            name: ``k`` or ``v``, for messages.
            codes, scale, zero: as above.
            dtype: ``int8``, ``int4``, ``float8_e4m3fn``, or that of a side in float.

        Raises:
            InputError: naming the tensor.
        """
        where = f"{name}_codes"
        if codes.dim() != 4:
            raise InputError("a cache has four axes", where=where, got=list(codes.shape), expected="[B, H, T, D]")
        batch, heads, capacity, _ = codes.shape
        static = scale is None or scale.dim() != 4 or (scale.shape[0], scale.shape[2]) != (batch, capacity)
        if scale is not None and batch == capacity == 1:  # both forms have these shapes
            static = static or scale.dtype == torch.float32
        spec = format_of(dtype, static=True, block=None, symmetric=zero is None)
        if spec is None:
            if scale is not None or zero is not None:
                raise InputError("a cache in float has no scales", where=f"{name}_scale", got=f"one, with {dtype}")
            port: str = dtype
        else:
            port = spec.port_dtype
        if codes.dtype != getattr(torch, port):
            raise InputError("codes of another dtype", where=where, got=codes.dtype, expected=f"torch.{port}")
        if spec is None:
            return cls(None, codes, None, None)
        if scale is None:
            raise InputError("codes without a scale", where=f"{name}_scale", got="none")
        width = codes.shape[3] * (2 if spec.is_packed else 1)
        if static:
            wanted: tuple[int, ...] = () if spec.is_float else (1, heads, 1, width)
            wanted_dtype = torch.float32
        else:
            groups = scale.shape[3]
            if groups < 1 or width % groups:
                raise InputError(
                    "groups have to divide a head", where=f"{name}_scale", got=f"{groups} groups of {width} channels"
                )
            spec = CacheFormat(spec.dtype, "per_token", width // groups, spec.symmetric)
            wanted, wanted_dtype = (batch, heads, capacity, groups), torch.float16
        for part, tensor, kind in (("scale", scale, wanted_dtype), ("zero", zero, torch.uint8)):
            if tensor is not None and (tuple(tensor.shape) != wanted or tensor.dtype != kind):
                got = f"{tensor.dtype} {list(tensor.shape)}"
                raise InputError(
                    "a tensor that does not fit", where=f"{name}_{part}", got=got, expected=f"{kind} {list(wanted)}"
                )
        return cls(spec, codes, scale, zero)

    def dequantized(self) -> Tensor:
        """All of it in float32 ``[B, H, capacity, D]``, by the graph's own operators."""
        if self.spec is None:
            return self.codes.to(torch.float32)
        assert self.scale is not None
        codes = _canonical.unpack_nibbles(self.codes, self.spec.symmetric) if self.spec.is_packed else self.codes
        axis, block = self.spec.place(self.width)
        values: Tensor = _canonical.dequantize(
            codes, self.scale.to(torch.float32), self.zero, axis, block, torch.float32
        )
        return values


def decode_attention_reference(
    q: Tensor,
    k_codes: Tensor,
    k_scale: Tensor | None,
    k_zero: Tensor | None,
    v_codes: Tensor,
    v_scale: Tensor | None,
    v_zero: Tensor | None,
    length: Tensor,
    k_dtype: str,
    v_dtype: str,
    sm_scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """The graph's own ``dequantize`` and ``attention``, on all that a cache has room for, what is unused masked.

    Args:
        q: ``[B, Hq, S, D]``, Hq a multiple of H; query ``s`` is token ``length - S + s``.
        k_codes, k_scale, k_zero: the keys, see `Side`.
        v_codes, v_scale, v_zero: the values; their heads may have another width, Dv.
        length: int32 ``[1]``, or ``[B]`` for sequences of different lengths: tokens in the cache, the new ones too.
        k_dtype, v_dtype: ``int8``, ``int4``, ``float8_e4m3fn``, or that of a side in float.
        sm_scale: factor of the scores.
        window: only the last ``window`` tokens that are not in the future.
        softcap: ``c * tanh(scores / c)``.

    Returns:
        ``[B, Hq, S, Dv]`` of the dtype of ``q``; a query that sees nothing gives zeros.
    """
    keys = Side.of("k", k_codes, k_scale, k_zero, k_dtype)
    values = Side.of("v", v_codes, v_scale, v_zero, v_dtype)
    lengths = length.reshape(-1, 1, 1, 1)
    token = torch.arange(k_codes.shape[2], device=q.device)
    query = lengths - q.shape[2] + torch.arange(q.shape[2], device=q.device)[:, None]  # [1 or B, 1, S, 1]
    seen = (token <= query) & (token < lengths)
    if window is not None:
        seen = seen & (token > query - window)
    used = token[:, None] < lengths  # [1 or B, 1, capacity, 1]
    k, v = (torch.where(used, side.dequantized(), 0.0) for side in (keys, values))
    out = _canonical.attention(q.to(torch.float32), k, v, seen, sm_scale, False, None, softcap)
    return torch.where(seen.any(-1, keepdim=True), out, 0.0).to(q.dtype).contiguous()


def _decode_attention_cpu(
    q: Tensor,
    k_codes: Tensor,
    k_scale: Tensor | None,
    k_zero: Tensor | None,
    v_codes: Tensor,
    v_scale: Tensor | None,
    v_zero: Tensor | None,
    length: Tensor,
    k_dtype: str,
    v_dtype: str,
    sm_scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    keys, values = _check(q, k_codes, k_scale, k_zero, v_codes, v_scale, v_zero, length, k_dtype, v_dtype, window)
    lengths = length.tolist()
    for value in lengths:
        if not 0 <= value <= k_codes.shape[2]:
            raise position_error("length", value, f"0 to {k_codes.shape[2]}, the capacity")
    choice = choose(keys.spec, values.spec, keys.width, Device.of(q.device), q.dtype)
    if choice.implementation == "cpu":
        from qcompiler.lowering.kernels.cache import cpu as decode_attention_cpu

        return decode_attention_cpu.attend(q, keys, values, lengths, sm_scale, window, softcap)
    caches = (k_codes, k_scale, k_zero, v_codes, v_scale, v_zero)
    return decode_attention_reference(q, *caches, length, k_dtype, v_dtype, sm_scale, window, softcap)


def _decode_attention_cuda(
    q: Tensor,
    k_codes: Tensor,
    k_scale: Tensor | None,
    k_zero: Tensor | None,
    v_codes: Tensor,
    v_scale: Tensor | None,
    v_zero: Tensor | None,
    length: Tensor,
    k_dtype: str,
    v_dtype: str,
    sm_scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    keys, values = _check(q, k_codes, k_scale, k_zero, v_codes, v_scale, v_zero, length, k_dtype, v_dtype, window)
    device = Device.of(q.device)
    choices = [choose(keys.spec, values.spec, side.width, device, q.dtype).implementation for side in (keys, values)]
    if choices == ["triton", "triton"] and torch.float32 not in (k_codes.dtype, v_codes.dtype):
        from qcompiler.lowering.kernels.cache import triton_attention as decode_attention_triton

        with torch.cuda.device(q.device):
            return decode_attention_triton.launch(q, keys, values, length, sm_scale, window, softcap)
    caches = (k_codes, k_scale, k_zero, v_codes, v_scale, v_zero)
    return decode_attention_reference(q, *caches, length, k_dtype, v_dtype, sm_scale, window, softcap)


def _check(
    q: Tensor,
    k_codes: Tensor,
    k_scale: Tensor | None,
    k_zero: Tensor | None,
    v_codes: Tensor,
    v_scale: Tensor | None,
    v_zero: Tensor | None,
    length: Tensor,
    k_dtype: str,
    v_dtype: str,
    window: int | None,
) -> tuple[Side, Side]:
    """Refuses tensors that do not fit together.

    Raises:
        InputError: naming the tensor.
    """
    keys = Side.of("k", k_codes, k_scale, k_zero, k_dtype)
    values = Side.of("v", v_codes, v_scale, v_zero, v_dtype)
    if q.dim() != 4 or q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        got = f"{q.dtype} {list(q.shape)}"
        raise InputError("queries that do not fit", where="q", got=got, expected="float [B, Hq, S, D]")
    batch, query_heads, queries, width = q.shape
    if keys.codes.shape[0] != batch or keys.width != width or (query_heads % max(keys.codes.shape[1], 1)):
        got = f"queries {list(q.shape)}, keys {list(k_codes.shape[:3])} of {keys.width} channels"
        raise InputError("queries and keys that do not fit together", where="q", got=got)
    if values.codes.shape[:3] != keys.codes.shape[:3]:
        got = f"{list(v_codes.shape[:3])} and {list(k_codes.shape[:3])}"
        raise InputError("values and keys of different shapes", where="v_codes", got=got)
    if queries > MOST_QUERIES:
        remedy = "attend to longer inputs in float, ahead of the cache"
        expected = f"at most {MOST_QUERIES}"
        raise InputError("too many tokens at once", where="q", got=queries, expected=expected, remedy=remedy)
    if length.dtype != torch.int32 or length.shape not in ((1,), (batch,)):
        got = f"{length.dtype} {list(length.shape)}"
        raise InputError("lengths that do not fit", where="length", got=got, expected=f"int32 [1] or [{batch}]")
    if window is not None and window < 1:
        raise InputError("a window that shows nothing", where="window", got=window, expected="at least 1, or None")
    caches = {"k_codes": k_codes, "k_scale": k_scale, "k_zero": k_zero, "v_codes": v_codes, "v_scale": v_scale}
    for name, tensor in {"q": q, **caches, "v_zero": v_zero, "length": length}.items():
        if tensor is not None and tensor.device != q.device:
            raise InputError("tensors on several devices", where=name, got=tensor.device, expected=q.device)
        if tensor is not None and tensor.dim() and tensor.numel() and tensor.stride(-1) != 1:
            raise InputError("the last axis is not contiguous", where=name, got=f"strides {tensor.stride()}")
    return keys, values


def _decode_attention_fake(
    q: Tensor, k_codes: Tensor, k_scale: object, k_zero: object, v_codes: Tensor, *others: object, **options: object
) -> Tensor:
    v_dtype = options.get("v_dtype", others[4] if len(others) > 4 else None)
    return q.new_empty(*q.shape[:3], v_codes.shape[3] * (2 if v_dtype == "int4" else 1))


library.define(
    "decode_attention(Tensor q, Tensor k_codes, Tensor? k_scale, Tensor? k_zero, Tensor v_codes, Tensor? v_scale, "
    "Tensor? v_zero, Tensor length, str k_dtype, str v_dtype, float sm_scale, int? window=None, float? softcap=None) "
    "-> Tensor",
    fake=_decode_attention_fake,
    cpu=_decode_attention_cpu,
    cuda=_decode_attention_cuda,
)
