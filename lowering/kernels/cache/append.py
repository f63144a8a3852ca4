"""Keys and values of new tokens, quantized and written into a cache of fixed capacity: one kernel, nothing is copied.

A cache is a tensor ``[B, H, capacity, D]`` of which the first rows are in use. Appending writes rows ``start`` to
``start + S - 1`` in place; ``start`` lies on the device, so that a recorded CUDA graph can be replayed at any length.
The codes are those that ``choose_block_qparams``, ``quantize`` and ``pack_nibbles`` compute from float32 values, bit
for bit, so a cache of this kind holds what the graph's own ``kv_append`` of quantized values would.

| form of a cache | codes | scale | zero point |
|---|---|---|---|
| ``int8`` symmetric | int8 ``[B, H, capacity, D]`` | float16 ``[B, H, capacity, D / block]`` | |
| ``int8`` asymmetric | uint8, the same | the same | uint8, as the scale |
| ``int4`` | uint8 ``[B, H, capacity, D / 2]``, low nibble first, ``code + 8`` where symmetric | the same | the same |
| ``float8_e4m3fn`` | float8_e4m3fn ``[B, H, capacity, D]`` | the same | |
| static | as above | float32, stored: 0-D or ``[1, H, 1, D]`` | uint8, as the scale |
| ``float16``, ``bfloat16``, ``float32`` | the values | | |
"""

from typing import Literal, cast, get_args

import torch
from torch import Tensor

from qcompiler.errors import InputError
from qcompiler.ir import FLOAT_CACHES, CacheFormat
from qcompiler.lowering.kernels.launch import library
from qcompiler.lowering.kernels.launch.device import Choice, Device

__all__ = [
    "append_quantized_reference",
    "append_static_reference",
    "choose",
    "format_of",
    "position_error",
]

_canonical = torch.ops.qcompiler
_SMALLEST_SCALE, _LARGEST_SCALE = 2.0**-23, 65504.0
_LARGEST_FLOAT = 448.0
_CodeDtype = Literal["int8", "int4", "float8_e4m3fn"]


def choose(spec: CacheFormat | None, width: int, device: Device) -> Choice:
    """The implementation that appends to a cache.

    Args:
        spec: its format; None for a cache in float.
        width: channels of a head.
        device: it lies on.
    """
    if device.kind == "cpu":
        return Choice("cpu")
    if device.kind != "cuda":
        return Choice("reference", f"no kernel for devices of kind {device.kind}")
    if not device.has_triton:
        return Choice("reference", "Triton is not installed")
    if device.capability < 80:
        return Choice("reference", f"compute capability {device.capability} is below 80")
    if spec is not None and spec.is_packed and spec.scales == "per_token" and spec.block(width) % 2:
        return Choice("reference", f"groups of {spec.block(width)} channels split a byte of two codes")
    return Choice("triton")


def format_of(dtype: str, *, static: bool, block: int | None, symmetric: bool) -> CacheFormat | None:
    """The format that arguments of an operator name; None for a cache in float.

    Raises:
        InputError: for an unknown dtype.
    """
    if dtype in FLOAT_CACHES:
        return None
    if dtype not in get_args(_CodeDtype):
        expected = ", ".join((*get_args(_CodeDtype), *FLOAT_CACHES))
        raise InputError("unknown format of a cache", where="dtype", got=dtype, expected=expected)
    return CacheFormat(cast(_CodeDtype, dtype), "static" if static else "per_token", block, symmetric)


def position_error(name: str, position: int, expected: str) -> InputError:
    """A length or start that the cache does not have; only the CPU can look at one without waiting for the device."""
    return InputError("a position outside the cache", where=name, got=position, expected=expected)


def append_quantized_reference(
    new: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    start: Tensor,
    dtype: str,
    block: int,
    symmetric: bool,
) -> None:
    """Appends with scales per token, as the graph's own operators compute them.

    Args:
        new: float ``[B, H, S, D]``.
        codes, scale, zero_point: the cache, written in place; see the table above.
        start: int32 ``[1]``, or ``[B]`` for sequences of different lengths: the row of the first new token. Rows that
            would lie outside the cache are dropped.
        dtype: ``int8``, ``int4`` or ``float8_e4m3fn``.
        block: channels that share a scale.
        symmetric: without zero points.
    """
    spec = format_of(dtype, static=False, block=block, symmetric=symmetric)
    assert spec is not None
    wide = new.to(torch.float32)
    chosen, zero = _canonical.choose_block_qparams(wide, spec.code_dtype, block, spec.bits)
    offset = None if symmetric else zero
    fresh = _canonical.quantize(wide, chosen, offset, -1, block, spec.code_dtype, spec.bits)
    _write(codes, _canonical.pack_nibbles(fresh) if spec.is_packed else fresh, start)
    _write(scale, chosen, start)
    if zero_point is not None:
        _write(zero_point, zero, start)


def append_static_reference(
    new: Tensor, codes: Tensor, scale: Tensor | None, zero_point: Tensor | None, start: Tensor, dtype: str
) -> None:
    """Appends with stored scales, or, without any, values in float.

    Args:
        new: float ``[B, H, S, D]``.
        codes: the cache, written in place.
        scale, zero_point: stored, 0-D or ``[1, H, 1, D]``.
        start: as of `append_quantized_reference`.
        dtype: of the cache.
    """
    _write(codes, _static_codes(new, scale, zero_point, dtype), start)


def _static_codes(new: Tensor, scale: Tensor | None, zero_point: Tensor | None, dtype: str) -> Tensor:
    """Codes as the cache holds them, of the new tokens alone."""
    spec = format_of(dtype, static=True, block=None, symmetric=zero_point is None)
    if spec is None:
        return new.to(cast(torch.dtype, getattr(torch, dtype)))
    assert scale is not None
    axis, block = spec.place(new.shape[-1])
    wide = new.to(torch.float32)
    fresh = _canonical.quantize(wide, scale, zero_point, axis, block, spec.code_dtype, spec.bits)
    return cast(Tensor, _canonical.pack_nibbles(fresh)) if spec.is_packed else cast(Tensor, fresh)


def _write(cache: Tensor, fresh: Tensor, start: Tensor) -> None:
    """Puts new rows in their place without looking at ``start``."""
    row = torch.arange(cache.shape[2], device=cache.device) - start.reshape(-1, 1)  # [1 or B, capacity]
    inside = ((row >= 0) & (row < fresh.shape[2]))[:, None, :, None]
    source = row.clamp(0, fresh.shape[2] - 1)[:, None, :, None]
    moved = _bytes(fresh).gather(2, source.expand(*fresh.shape[:2], -1, fresh.shape[3]))
    _bytes(cache).copy_(torch.where(inside, moved, _bytes(cache)))


def _bytes(tensor: Tensor) -> Tensor:
    """Codes in float as the bytes they are: few operators take 8-bit floats."""
    return tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor


def _append_quantized_cpu(
    new: Tensor,
    codes: Tensor,
    scale: Tensor | None,
    zero_point: Tensor | None,
    start: Tensor,
    dtype: str,
    block: int,
    symmetric: bool,
) -> None:
    spec = _check(new, codes, scale, zero_point, start, dtype, block=block, symmetric=symmetric)
    if not new.numel():
        return
    assert spec is not None
    assert scale is not None
    blocks = new.to(torch.float32).unflatten(-1, (-1, block))
    if spec.code_dtype == torch.uint8:
        low, high = torch.aminmax(blocks, dim=-1, keepdim=True)
        most = (1 << spec.bits) - 1
        low, wanted = low.clamp_(max=0), high.clamp_(min=0)
        wanted = wanted.sub_(low).div_(most)
    else:
        largest = _LARGEST_FLOAT if spec.is_float else float((1 << (spec.bits - 1)) - 1)
        wanted = blocks.abs().amax(-1, keepdim=True).div_(largest)
    stored = wanted.clamp_(_SMALLEST_SCALE, _LARGEST_SCALE).to(torch.float16)
    used = stored.to(torch.float32)
    zero = None
    if spec.code_dtype == torch.uint8:
        zero = low.neg_().div_(used).round_().clamp_(0, most)
    fresh = _encode(blocks / used, zero, spec).flatten(-2)
    _put(codes, _canonical.pack_nibbles(fresh) if spec.is_packed else fresh, start)
    _put(scale, stored.squeeze(-1), start)
    if zero is not None and zero_point is not None:
        _put(zero_point, zero.squeeze(-1).to(torch.uint8), start)


def _encode(steps: Tensor, zero: Tensor | None, spec: CacheFormat) -> Tensor:
    """Values in units of their scale as codes; overwrites them."""
    if spec.is_float:
        return steps.clamp_(-_LARGEST_FLOAT, _LARGEST_FLOAT).to(torch.float8_e4m3fn)
    steps = steps.round_()
    if zero is not None:
        steps = steps.add_(zero)
    low = 0 if spec.code_dtype == torch.uint8 else -(1 << (spec.bits - 1))
    return steps.clamp_(low, low + (1 << spec.bits) - 1).to(spec.code_dtype)


def _append_static_cpu(
    new: Tensor, codes: Tensor, scale: Tensor | None, zero_point: Tensor | None, start: Tensor, dtype: str
) -> None:
    _check(new, codes, scale, zero_point, start, dtype, block=None, symmetric=zero_point is None)
    if new.numel():
        _put(codes, _static_codes(new, scale, zero_point, dtype), start)


def _put(cache: Tensor, fresh: Tensor, start: Tensor) -> None:
    """Writes rows where ``start`` says.

    Raises:
        InputError: if they do not fit.
    """
    firsts = start.tolist()
    for first in firsts:
        if not 0 <= first <= cache.shape[2] - fresh.shape[2]:
            fits = f"0 to {cache.shape[2] - fresh.shape[2]}: {fresh.shape[2]} rows into {cache.shape[2]}"
            raise position_error("start", first, fits)
    for i, first in enumerate(firsts):
        part = slice(None) if len(firsts) == 1 else slice(i, i + 1)
        cache[part, :, first : first + fresh.shape[2]] = fresh[part]


def _append_quantized_cuda(
    new: Tensor,
    codes: Tensor,
    scale: Tensor | None,
    zero_point: Tensor | None,
    start: Tensor,
    dtype: str,
    block: int,
    symmetric: bool,
) -> None:
    spec = _check(new, codes, scale, zero_point, start, dtype, block=block, symmetric=symmetric)
    if not new.numel():
        return
    assert scale is not None
    if choose(spec, new.shape[3], Device.of(new.device)).implementation == "triton":
        from qcompiler.lowering.kernels.cache import triton_append as cache_append_triton

        with torch.cuda.device(new.device):
            cache_append_triton.launch(new, codes, scale, zero_point, start, spec)
    else:
        append_quantized_reference(new, codes, scale, zero_point, start, dtype, block, symmetric)


def _append_static_cuda(
    new: Tensor, codes: Tensor, scale: Tensor | None, zero_point: Tensor | None, start: Tensor, dtype: str
) -> None:
    spec = _check(new, codes, scale, zero_point, start, dtype, block=None, symmetric=zero_point is None)
    if not new.numel():
        return
    if choose(spec, new.shape[3], Device.of(new.device)).implementation == "triton":
        from qcompiler.lowering.kernels.cache import triton_append as cache_append_triton

        with torch.cuda.device(new.device):
            cache_append_triton.launch(new, codes, scale, zero_point, start, spec)
    else:
        append_static_reference(new, codes, scale, zero_point, start, dtype)


def _check(
    new: Tensor,
    codes: Tensor,
    scale: Tensor | None,
    zero_point: Tensor | None,
    start: Tensor,
    dtype: str,
    *,
    block: int | None,
    symmetric: bool,
) -> CacheFormat | None:
    """Refuses tensors that do not fit together; the format of the cache.

    Raises:
        InputError: naming the tensor.
    """
    if new.dim() != 4 or not new.dtype.is_floating_point or new.dtype.itemsize < 2:
        raise _unfit("new", new, "floating point [batch, heads, tokens, channels]")
    batch, heads, tokens, width = new.shape
    capacity = codes.shape[2] if codes.dim() == 4 else 0
    spec = format_of(dtype, static=block is None, block=block, symmetric=symmetric)
    if spec is None:
        if block is not None:
            raise InputError("a cache in float has no scales per token", where="dtype", got=dtype)
        _match("codes", codes, (batch, heads, capacity, width), getattr(torch, dtype))
    else:
        if width % spec.block(width) or (spec.is_packed and width % 2):
            fitting = f"a divisor of {width}, and an even width for packed codes"
            raise InputError("groups that do not divide a head", where="block", got=block, expected=fitting)
        stored = width // 2 if spec.is_packed else width
        _match("codes", codes, (batch, heads, capacity, stored), getattr(torch, spec.port_dtype))
        groups = (batch, heads, capacity, width // spec.block(width)) if block is not None else (1, heads, 1, width)
        if scale is None:
            raise InputError("codes without a scale", where="scale", got="none")
        if block is not None or not spec.is_float:
            _match("scale", scale, groups, torch.float16 if block is not None else torch.float32)
        else:
            _match("scale", scale, (), torch.float32)
        if (zero_point is None) != symmetric:
            got, wanted = ("none", "one per scale") if zero_point is None else ("a tensor", "none: it is symmetric")
            raise InputError("zero points that do not fit", where="zero_point", got=got, expected=wanted)
        if zero_point is not None:
            _match("zero_point", zero_point, groups, torch.uint8)
    if tokens > capacity:
        raise InputError("more tokens than the cache holds", where="new", got=tokens, expected=f"at most {capacity}")
    if start.dtype != torch.int32 or start.shape not in ((1,), (batch,)):
        raise _unfit("start", start, f"int32 [1] or [{batch}]")
    others = {"codes": codes, "scale": scale, "zero_point": zero_point, "start": start}
    for name, tensor in others.items():
        if tensor is not None and tensor.device != new.device:
            raise InputError("tensors on several devices", where=name, got=tensor.device, expected=new.device)
    for name, tensor in {"new": new, **others}.items():
        if tensor is not None and tensor.dim() and tensor.numel() and tensor.stride(-1) != 1:
            raise InputError("the last axis is not contiguous", where=name, got=f"strides {tensor.stride()}")
    return spec


def _match(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tuple(tensor.shape) != shape or tensor.dtype != dtype:
        raise _unfit(name, tensor, f"{dtype} {list(shape)}")


def _unfit(name: str, tensor: Tensor, expected: str) -> InputError:
    return InputError(
        "a tensor that does not fit", where=name, got=f"{tensor.dtype} {list(tensor.shape)}", expected=expected
    )


def _nothing(*arguments: object) -> None:
    """Writes in place and returns nothing, whatever the shapes."""


library.define(
    "append_quantized(Tensor new, Tensor(a!) codes, Tensor(b!)? scale, Tensor(c!)? zero_point, Tensor start, "
    "str dtype, int block, bool symmetric) -> ()",
    fake=_nothing,
    cpu=_append_quantized_cpu,
    cuda=_append_quantized_cuda,
)
library.define(
    "append_static(Tensor new, Tensor(a!) codes, Tensor? scale, Tensor? zero_point, Tensor start, str dtype) -> ()",
    fake=_nothing,
    cpu=_append_static_cpu,
    cuda=_append_static_cuda,
)
