"""Triton kernels of the activation quantizers: one program per row, range and codes from one read of it.

A row of up to `_ONE_PASS` elements stays in registers between its reductions and its codes; longer ones are read again,
from the cache. Quotients are rounded as IEEE 754 has it, so that codes equal the reference's. 8-bit floats are rounded
by an instruction from compute capability 8.9 on, and by integer arithmetic on older devices and in Triton's
interpreter, whose own conversion does not round.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qcompiler.lowering.kernels.launch import tuning
from qcompiler.lowering.kernels.launch.device import Device
from qcompiler.lowering.kernels.launch.machine_code import KernelCase
from qcompiler.lowering.kernels.rows.quantize_rows import FLOAT_MAX, SMALLEST_SCALE, code_range
from qcompiler.lowering.kernels.rows.triton_encode import _normed_values, _to_codes

__all__ = ["RowConfig", "ahead_of_time", "configs", "default_config", "launch", "launch_static"]

_ONE_PASS = 32768
_LOOPED = 4096  # elements read at once of longer rows
_ELEMENTS = 1024  # of one program where no row is reduced
_MANTISSA = {torch.float8_e4m3fn: 3, torch.float8_e5m2: 2}


@dataclass(frozen=True)
class RowConfig:
    """How a row is split over threads.

    Attributes:
        block: elements read at once, a power of two.
        warps: of 32 threads.
    """

    block: int
    warps: int


@cache  # asked at every launch
def default_config(width: int) -> RowConfig:
    """Sixteen elements per thread, where that many threads can work together."""
    block = max(32, 1 << (width - 1).bit_length()) if width <= _ONE_PASS else _LOOPED
    return RowConfig(block, min(16, max(1, block // 512)))


def configs(width: int) -> tuple[RowConfig, ...]:
    """The default first, then half and twice its threads."""
    first = default_config(width)
    others = (warps for warps in (first.warps // 2, first.warps * 2) if 1 <= warps <= 16)
    return (first, *(RowConfig(first.block, warps) for warps in others if first.block // warps <= 32 * 64))


@triton.jit
def _rows_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    weight_ptr,
    codes_ptr,
    scale_ptr,
    zero_ptr,
    width,
    eps,
    clip,
    reach,
    low,
    high,
    smallest,
    BLOCK: tl.constexpr,
    ONE_PASS: tl.constexpr,
    NORM: tl.constexpr,
    STATIC: tl.constexpr,
    ZERO: tl.constexpr,
    MANTISSA: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """Codes of one row. With ``STATIC``, scale and zero point are read; else they are computed and written."""
    row = tl.program_id(0).to(tl.int64)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    x_ptr += row * width
    codes_ptr += row * width
    columns = tl.arange(0, BLOCK)
    mask = columns < width
    inverse = 1.0
    x = tl.zeros([BLOCK], tl.float32)
    if ONE_PASS:
        x = tl.load(x_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    if NORM:
        if ONE_PASS:
            square = tl.sum(x * x, 0)
        else:
            squares = tl.zeros([BLOCK], tl.float32)
            for start in range(0, width, BLOCK):
                part = tl.load(x_ptr + start + columns, mask=start + columns < width, other=0.0).to(tl.float32)
                squares += part * part
            square = tl.sum(squares, 0)
        inverse = tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(square, tl.cast(width, tl.float32)) + eps))
        if ONE_PASS:
            x = _normed_values(x, weight_ptr, columns, mask, inverse, NORM, dtype)
    zero = 0
    if STATIC:
        scale = tl.load(scale_ptr)
        if ZERO:
            zero = tl.load(zero_ptr).to(tl.int32)
    else:
        if ONE_PASS:
            most, least, nothing = tl.max(x, 0), tl.min(x, 0), tl.sum(x * 0.0, 0)
        else:
            largest = tl.zeros([BLOCK], tl.float32)
            smaller = tl.zeros([BLOCK], tl.float32)
            nothings = tl.zeros([BLOCK], tl.float32)
            for start in range(0, width, BLOCK):
                inside = start + columns < width
                part = tl.load(x_ptr + start + columns, mask=inside, other=0.0).to(tl.float32)
                part = _normed_values(part, weight_ptr, start + columns, inside, inverse, NORM, dtype)
                largest = tl.maximum(largest, part)
                smaller = tl.minimum(smaller, part)
                nothings += part * 0.0
            most, least, nothing = tl.max(largest, 0), tl.min(smaller, 0), tl.sum(nothings, 0)
        if ZERO:
            most, least = tl.maximum(most, 0.0) * clip, tl.minimum(least, 0.0) * clip
            scale = tl.maximum(tl.div_rn(most - least, reach), smallest) + nothing
            offset = tl.minimum(tl.maximum(tl.div_rn(-least, scale), 0.0), reach)
            zero = (offset + 12582912.0).to(tl.int32, bitcast=True) & 0xFF
            tl.store(zero_ptr + row, zero.to(tl.uint8))
        else:
            # NaN and infinity, times zero, are NaN: maximum and minimum would pass over NaN.
            scale = tl.maximum(tl.div_rn(tl.maximum(most, -least) * clip, reach), smallest) + nothing
        tl.store(scale_ptr + row, scale)
    zero = tl.full([], 0, tl.int32) + zero
    if ONE_PASS:
        tl.store(codes_ptr + columns, _to_codes(x, scale, zero, low, high, MANTISSA, NATIVE), mask=mask)
    else:
        for start in range(0, width, BLOCK):
            inside = start + columns < width
            part = tl.load(x_ptr + start + columns, mask=inside, other=0.0).to(tl.float32)
            part = _normed_values(part, weight_ptr, start + columns, inside, inverse, NORM, dtype)
            tl.store(
                codes_ptr + start + columns, _to_codes(part, scale, zero, low, high, MANTISSA, NATIVE), mask=inside
            )


@triton.jit
def _elements_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    codes_ptr,
    scale_ptr,
    zero_ptr,
    count,
    low,
    high,
    BLOCK: tl.constexpr,
    ZERO: tl.constexpr,
    MANTISSA: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """Codes of ``BLOCK`` elements that share one scale."""
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = places < count
    x = tl.load(x_ptr + places, mask=mask, other=0.0).to(tl.float32)
    zero = tl.full([], 0, tl.int32)
    if ZERO:
        zero = tl.load(zero_ptr).to(tl.int32)
    codes = _to_codes(x, tl.load(scale_ptr), zero, low, high, MANTISSA, NATIVE)
    tl.store(codes_ptr + places, codes, mask=mask)


def launch(
    x: Tensor,
    dtype: torch.dtype,
    *,
    clip: float = 1.0,
    bits: int = 8,
    norm: tuple[Tensor, float] | None = None,
    config: RowConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes, scale and zero point (uint8 codes alone) of every row of the last axis.

    Args:
        x: float ``[..., K]``, K at least 1; copied where it is not contiguous.
        dtype: of the codes.
        clip: the share of the range that is covered.
        bits: of integer codes.
        norm: weight ``[K]`` and epsilon of an RMS norm ahead.
        config: other than the default.
    """
    zero = None
    if dtype == torch.uint8:
        zero = torch.empty((*x.shape[:-1], 1), dtype=dtype, device=x.device)
    scale = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
    reach = FLOAT_MAX.get(dtype, (1 << bits) - 1 if dtype == torch.uint8 else (1 << (bits - 1)) - 0.5)
    codes = _launch_rows(x, dtype, scale, zero, bits, clip, reach, norm, config, is_static=False)
    return codes, scale, zero


def launch_static(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    dtype: torch.dtype,
    *,
    bits: int = 8,
    norm: tuple[Tensor, float] | None = None,
    config: RowConfig | None = None,
) -> Tensor:
    """Codes for a scale, and a zero point, of one element each; the rest as `launch`."""
    if norm is not None:
        return _launch_rows(x, dtype, scale, zero_point, bits, 1.0, 1.0, norm, config, is_static=True)
    x = x.contiguous()
    codes = torch.empty(x.shape, dtype=dtype, device=x.device)
    if x.numel():
        low, high = code_range(dtype, bits)
        _elements_kernel[(-(-x.numel() // _ELEMENTS),)](
            x,
            codes.view(torch.uint8),
            scale,
            scale if zero_point is None else zero_point,
            x.numel(),
            low,
            high,
            BLOCK=_ELEMENTS,
            ZERO=zero_point is not None,
            MANTISSA=_MANTISSA.get(dtype, 0),
            NATIVE=_rounds_floats(x.device),
            num_warps=4,
        )
    return codes


def _launch_rows(
    x: Tensor,
    dtype: torch.dtype,
    scale: Tensor,
    zero: Tensor | None,
    bits: int,
    clip: float,
    reach: float,
    norm: tuple[Tensor, float] | None,
    config: RowConfig | None,
    *,
    is_static: bool,
) -> Tensor:
    x, width = x.contiguous(), x.shape[-1]
    codes = torch.empty(x.shape, dtype=dtype, device=x.device)
    key = (tuning.row_bucket(x.numel() // width), width, norm is not None)
    config = config or tuning.found(x.device, "quantize_rows", key, RowConfig, lambda: configs(width))
    config = config or default_config(width)
    weight, eps = (x, 0.0) if norm is None else (norm[0].contiguous(), norm[1])
    if x.numel():
        low, high = code_range(dtype, bits)
        _rows_kernel[(x.numel() // width,)](
            x,
            weight,
            codes.view(torch.uint8),
            scale,
            scale if zero is None else zero,
            width,
            float(eps),
            float(clip),
            float(reach),
            low,
            high,
            SMALLEST_SCALE,
            BLOCK=config.block,
            ONE_PASS=width <= config.block,
            NORM=norm is not None,
            STATIC=is_static,
            ZERO=zero is not None,
            MANTISSA=_MANTISSA.get(dtype, 0),
            NATIVE=_rounds_floats(x.device),
            num_warps=config.warps,
            enable_fp_fusion=False,  # the two ends of a clipped range are rounded before they are subtracted
        )
    return codes


def _rounds_floats(device: torch.device) -> bool:
    """Whether an instruction rounds to 8-bit floats."""
    return Device.of(device).capability >= 89


def ahead_of_time() -> Iterator[KernelCase]:
    """Every configuration with rows of every length; at 4096 and in the loop every form of the kernel."""
    for block in (*(1 << power for power in range(5, _ONE_PASS.bit_length())), 0):
        width = block or _ONE_PASS + 1
        for config in configs(width):
            is_whole = block in (0, 4096) and config == default_config(width)
            for case in _FORMS if is_whole else _FORMS[:1]:
                yield _rows_case(config, width, **case)
    for codes in ("int8", "uint8", "e4m3", "e5m2"):
        yield _elements_case(codes)


_FORMS: tuple[dict[str, Any], ...] = (
    {"codes": "int8", "floats": "bf16", "norm": True, "static": False},
    {"codes": "e4m3", "floats": "bf16", "norm": True, "static": False},
    {"codes": "int8", "floats": "fp16", "norm": False, "static": False},
    {"codes": "uint8", "floats": "fp16", "norm": False, "static": False},
    {"codes": "uint8", "floats": "bf16", "norm": True, "static": True},
    {"codes": "e5m2", "floats": "fp16", "norm": False, "static": False},
)


def _code_options(codes: str) -> dict[str, Any]:
    return {"ZERO": codes == "uint8", "MANTISSA": {"e4m3": 3, "e5m2": 2}.get(codes, 0)}


def _rows_case(config: RowConfig, width: int, codes: str, floats: str, norm: bool, static: bool) -> KernelCase:
    numbers = dict.fromkeys(("eps", "clip", "reach", "low", "high", "smallest"), "fp32")
    native, one_pass = codes in ("e4m3", "e5m2"), width <= config.block
    tags = [
        "rows" if one_pass else "loop",
        *(["default"] if config == default_config(width) and config.block == 4096 else []),
        *(str(config.block), str(config.warps), codes, floats),
        *(["norm"] if norm else []),
        *(["static"] if static else []),
    ]
    return KernelCase(
        name="-".join(tags),
        kernel=_rows_kernel,
        types={
            "x_ptr": f"*{floats}",
            "weight_ptr": f"*{floats}",
            "codes_ptr": "*u8",
            "scale_ptr": "*fp32",
            "zero_ptr": "*u8",
            "width": "i32",
            **numbers,
        },
        constants={
            "BLOCK": config.block,
            "ONE_PASS": one_pass,
            "NORM": norm,
            "STATIC": static,
            "NATIVE": native,
            **_code_options(codes),
        },
        options={"num_warps": config.warps, "enable_fp_fusion": False},
        mma={90: None} if native else {80: None, 90: None},
    )


def _elements_case(codes: str) -> KernelCase:
    native = codes in ("e4m3", "e5m2")
    return KernelCase(
        name=f"elements-default-{codes}",
        kernel=_elements_kernel,
        types={
            "x_ptr": "*bf16",
            "codes_ptr": "*u8",
            "scale_ptr": "*fp32",
            "zero_ptr": "*u8",
            "count": "i32",
            "low": "fp32",
            "high": "fp32",
        },
        constants={"BLOCK": _ELEMENTS, "NATIVE": native, **_code_options(codes)},
        options={"num_warps": 4},
        mma={90: None} if native else {80: None, 90: None},
    )
