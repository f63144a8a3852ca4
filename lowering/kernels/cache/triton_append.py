"""The Triton kernel of appends: ranges, codes and packing of some rows in registers, written where they belong.

A tile is ``[rows, groups, channels of a group]``, padded to powers of two. Quotients are divided and rounded as IEEE
754 has it, so codes equal those of the operators of the graph. Codes are written as bytes; 8-bit floats are made by
integer arithmetic, which every device has, and the interpreter of Triton too.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qcompiler.ir import CacheFormat
from qcompiler.lowering.kernels.launch import tuning
from qcompiler.lowering.kernels.launch.machine_code import KernelCase

__all__ = ["Config", "ahead_of_time", "configs", "default_config", "launch"]

_FLOAT, _SIGNED, _UNSIGNED, _FLOAT8 = range(4)


@dataclass(frozen=True)
class Config:
    """How rows are given to programs.

    Attributes:
        rows: of one program, a power of two.
        warps: of 32 threads.
    """

    rows: int
    warps: int


def default_config(rows: int, padded: int) -> Config:
    """One row per program as long as there are few, then tiles of a thousand elements.

    Args:
        rows: batch times heads times new tokens.
        padded: elements of a row in registers.
    """
    if rows <= 512:
        return Config(1, 1 if padded <= 256 else 4)
    return Config(max(1, 1024 // padded), 4)


def configs(rows: int, padded: int) -> tuple[Config, ...]:
    """What a search tries: the default first, then others of 2 to 16 elements per thread."""
    tiles = [c for c in (Config(1, 1), Config(4, 1), Config(8, 4)) if 64 <= c.rows * padded // c.warps <= 512]
    return tuple(dict.fromkeys([default_config(rows, padded), *tiles]))


@triton.jit
def _rounded(steps):  # type: ignore[no-untyped-def]
    """To the nearest integer, ties to even, of numbers below 2^22: ``1.5 * 2^23`` leaves no bits behind the point."""
    return (steps + 12582912.0) - 12582912.0


@triton.jit
def _float8(steps):  # type: ignore[no-untyped-def]
    """The bytes of E4M3 numbers nearest to float32 ones of at most 448; ties to even, not a number stays so.

    Half a step is added to the bits of a normal number; those below 2^-6 have even steps of 2^-9.
    """
    bits = steps.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
    small = (tl.abs(steps) * 512.0 + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000
    code = tl.where(size < (121 << 23), small, normal)
    code = tl.where(size > 0x7F800000, 0x7F, code)
    return code | ((bits >> 24) & 0x80)


@triton.jit
def _clamped(values, low, high):  # type: ignore[no-untyped-def]
    """By comparisons, so that what is not a number stays so."""
    values = tl.where(values < low, low, values)
    return tl.where(values > high, high, values)


@triton.jit
def append_kernel(  # type: ignore[no-untyped-def]
    new,
    codes,
    scale,
    zero,
    start,
    rows,
    heads,
    tokens,
    capacity,
    start_step,
    new_b,
    new_h,
    new_t,
    codes_b,
    codes_h,
    codes_t,
    scale_b,
    scale_h,
    scale_t,
    zero_b,
    zero_h,
    zero_t,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    CHANNELS: tl.constexpr,
    KIND: tl.constexpr,
    BITS: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    ZERO: tl.constexpr,
):
    """Rows of all heads and sequences; with stored scales, ``scale_t`` and ``zero_t`` are steps between channels."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    batch = (row // (heads * tokens)).to(tl.int64)
    head = ((row // tokens) % heads).to(tl.int64)
    token = row % tokens
    place = tl.load(start + batch * start_step, mask=row < rows, other=-1) + token
    inside = (row < rows) & (place >= 0) & (place < capacity)
    place = place.to(tl.int64)
    group = tl.arange(0, GROUPS)
    inner = tl.arange(0, CHANNELS)
    channel = group[None, :, None] * BLOCK + inner[None, None, :]
    mask = inside[:, None, None] & (inner[None, None, :] < BLOCK) & (channel < WIDTH)
    from_row = new + batch * new_b + head * new_h + token.to(tl.int64) * new_t
    to_row = codes + batch * codes_b + head * codes_h + place * codes_t
    x = tl.load(from_row[:, None, None] + channel, mask=mask, other=0.0)
    if KIND == 0:
        tl.store(to_row[:, None, None] + channel, x.to(codes.dtype.element_ty), mask=mask)
    else:
        x = x.to(tl.float32)
        levels: tl.constexpr = (1 << BITS) - 1
        if PER_TOKEN:
            size = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 2).to(tl.float32, bitcast=True)
            if ZERO:
                lowest = tl.minimum(tl.min(x, 2), 0.0)
                reach = tl.maximum(tl.max(x, 2), 0.0) - lowest
                reach = tl.where(size != size, size, reach)  # the range of what is not a number
                wanted = tl.div_rn(reach, tl.full([ROWS, GROUPS], levels, tl.float32))
            else:
                largest: tl.constexpr = 448.0 if KIND == 3 else float((1 << (BITS - 1)) - 1)
                wanted = tl.div_rn(size, tl.full([ROWS, GROUPS], largest, tl.float32))
            stored = _clamped(wanted, 2.0**-23, 65504.0).to(tl.float16)
            step = stored.to(tl.float32)
            there = inside[:, None] & (group[None, :] * BLOCK < WIDTH)
            to_scale = scale + batch * scale_b + head * scale_h + place * scale_t
            tl.store(to_scale[:, None] + group[None, :], stored, mask=there)
            step = step[:, :, None]
            if ZERO:
                offset = tl.div_rn(-lowest, tl.reshape(step, [ROWS, GROUPS]))
                offset = _rounded(_clamped(offset, 0.0, levels))
                offset = tl.where(offset == offset, offset, 0.0)
                to_zero = zero + batch * zero_b + head * zero_h + place * zero_t
                tl.store(to_zero[:, None] + group[None, :], offset.to(tl.uint8), mask=there)
                offset = offset[:, :, None]
        else:
            if KIND == 3:
                step = tl.load(scale)
            else:
                stored_at = (head * scale_h)[:, None, None] + channel * scale_t
                step = tl.load(scale + stored_at, mask=mask, other=1.0)
            if ZERO:
                stored_at = (head * zero_h)[:, None, None] + channel * zero_t
                offset = tl.load(zero + stored_at, mask=mask, other=0).to(tl.float32)
        steps = tl.div_rn(x, step + tl.zeros_like(x))
        if KIND == 3:
            found = _float8(_clamped(steps, -448.0, 448.0))
        else:
            whole = _rounded(_clamped(steps, -1024.0, 1024.0))
            whole = tl.where(whole == whole, whole, 0.0)  # what is not a number shows in its scale
            if ZERO:
                found = _clamped(whole + offset, 0.0, levels).to(tl.int32)
            else:
                half: tl.constexpr = 1 << (BITS - 1)
                found = _clamped(whole, -half, half - 1).to(tl.int32)
                if BITS == 4:
                    found += 8
        if BITS == 4:
            low, high = tl.split(tl.reshape(found, [ROWS, GROUPS, CHANNELS // 2, 2]))
            pair = tl.arange(0, CHANNELS // 2)
            byte = group[None, :, None] * (BLOCK // 2) + pair[None, None, :]
            mask = inside[:, None, None] & (pair[None, None, :] < BLOCK // 2) & (byte < WIDTH // 2)
            tl.store(to_row[:, None, None] + byte, (low | (high << 4)).to(tl.uint8), mask=mask)
        else:
            tl.store(to_row[:, None, None] + channel, found.to(tl.uint8), mask=mask)


def _constants(spec: CacheFormat | None, width: int, config: Config) -> dict[str, Any]:
    block = width if spec is None else spec.block(width)
    kind = _FLOAT
    if spec is not None:
        kind = _FLOAT8 if spec.is_float else _SIGNED if spec.symmetric else _UNSIGNED
    return {
        "WIDTH": width,
        "BLOCK": block,
        "ROWS": config.rows,
        "GROUPS": _power_of_2(width // block),
        "CHANNELS": _power_of_2(block),
        "KIND": kind,
        "BITS": 16 if spec is None else spec.bits,
        "PER_TOKEN": spec is not None and spec.scales == "per_token",
        "ZERO": kind == _UNSIGNED,
    }


def _power_of_2(least: int) -> int:
    """The next; Triton's own takes microseconds, at every launch."""
    return 1 << (least - 1).bit_length()


def _padded(spec: CacheFormat | None, width: int) -> int:
    block = width if spec is None else spec.block(width)
    return _power_of_2(width // block) * _power_of_2(block)


def launch(
    new: Tensor,
    codes: Tensor,
    scale: Tensor | None,
    zero_point: Tensor | None,
    start: Tensor,
    spec: CacheFormat | None,
    config: Config | None = None,
) -> None:
    """Appends to a cache, of arguments that have been checked.

    Args:
        new: float ``[B, H, S, D]``, not empty.
        codes, scale, zero_point, start: as of the operators.
        spec: the format; None for a cache in float.
        config: None: what a search found, or the default.
    """
    batch, heads, tokens, width = new.shape
    rows, padded = batch * heads * tokens, _padded(spec, width)
    if config is None:
        key = (str(spec), width, str(new.dtype), tuning.row_bucket(rows))
        found = tuning.found(new.device, "append", key, Config, lambda: configs(rows, padded))
        config = found or default_config(rows, padded)
    stored = codes if spec is None else codes.view(torch.uint8)
    scale_steps, zero_steps = _steps(scale, spec), _steps(zero_point, spec)
    append_kernel[(-(-rows // config.rows),)](
        new,
        stored,
        stored if scale is None else scale,
        stored if zero_point is None else zero_point,
        start,
        rows,
        heads,
        tokens,
        codes.shape[2],
        0 if start.shape[0] == 1 else start.stride(0),
        *new.stride()[:3],
        *stored.stride()[:3],
        *scale_steps,
        *zero_steps,
        **_constants(spec, width, config),
        num_warps=config.warps,
    )


def _steps(qparam: Tensor | None, spec: CacheFormat | None) -> tuple[int, int, int]:
    """Strides of batch, head and token; of a stored one: nothing, head, channel."""
    if qparam is None or qparam.dim() == 0:
        return 0, 0, 0
    batch, head, token, channel = qparam.stride()
    if spec is not None and spec.scales == "static":
        return 0, head, channel
    return batch, head, token


def ahead_of_time() -> Iterator[KernelCase]:
    """Every form of cache, with every configuration for heads of 128 channels, and the default for 80."""
    forms: dict[str, list[CacheFormat | None]] = {
        "common": [
            CacheFormat("int8"),
            CacheFormat("float8_e4m3fn"),
            CacheFormat("int4", group_size=16, symmetric=False),
        ],
        "other": [
            None,
            CacheFormat("int8", symmetric=False),
            CacheFormat("int4"),
            CacheFormat("int8", "static"),
            CacheFormat("int4", "static", symmetric=False),
            CacheFormat("float8_e4m3fn", "static"),
        ],
    }
    for group, specs in forms.items():
        for spec in specs:
            for width in (80, 128):
                padded = _padded(spec, width)
                first = default_config(1, padded)
                chosen = {first, default_config(4096, padded), *(configs(1, padded) if width == 128 else ())}
                for config in sorted(chosen, key=lambda config: (config != first, config.rows, config.warps)):
                    is_common = group == "common" and width == 128 and config == first
                    yield _case(spec, width, config, "common" if is_common else "other")


def _case(spec: CacheFormat | None, width: int, config: Config, group: str) -> KernelCase:
    counts = ("rows", "heads", "tokens", "capacity", "start_step")
    is_static = spec is not None and spec.scales == "static"
    types = {"new": "*fp16", "codes": "*fp16" if spec is None else "*u8", "scale": "*fp32" if is_static else "*fp16"}
    types |= {"zero": "*u8", "start": "*i32"} | dict.fromkeys(counts, "i32")
    types |= {f"{tensor}_{axis}": "i32" for tensor in ("new", "codes", "scale", "zero") for axis in "bht"}
    return KernelCase(
        f"{group}: {spec or 'float'}, {width} channels, {config.rows} rows, {config.warps} warps",
        append_kernel,
        types,
        _constants(spec, width, config),
        {"num_warps": config.warps, "num_stages": 1},
        {80: None, 90: None},
        unaligned=frozenset(counts),
    )
