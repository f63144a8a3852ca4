"""From floats to codes, inside a kernel."""

import triton
import triton.language as tl

__all__ = ["_normed_values", "_to_codes"]


@triton.jit
def _encode(values, zero, MANTISSA: tl.constexpr, NATIVE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Clamped float32 values to the bytes of their codes; ties to even.

    Integers (``MANTISSA`` 0): adding ``1.5 * 2^23`` leaves the nearest integer in the low bits. Floats: half a step is
    added to the bits of a normal number; below those, steps are even, and the same addition rounds.
    """
    if MANTISSA == 0:
        codes = ((values + 12582912.0).to(tl.int32, bitcast=True) + zero).to(tl.uint8)
    elif NATIVE:
        if MANTISSA == 3:
            codes = values.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
        else:
            codes = values.to(tl.float8e5).to(tl.uint8, bitcast=True)
    else:
        rebias: tl.constexpr = 120 if MANTISSA == 3 else 112
        subnormal: tl.constexpr = 512.0 if MANTISSA == 3 else 65536.0
        shift: tl.constexpr = 23 - MANTISSA
        bits = values.to(tl.int32, bitcast=True)
        size = bits & 0x7FFFFFFF
        normal = ((size + ((1 << (shift - 1)) - 1) + ((size >> shift) & 1)) >> shift) - (rebias << MANTISSA)
        small = (tl.abs(values) * subnormal + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000
        found = tl.where(size < ((rebias + 1) << 23), small, normal)
        found = tl.where(size > 0x7F800000, 0x7F, found)
        codes = (found | ((bits >> 24) & 0x80)).to(tl.uint8)
    return codes


@triton.jit
def _to_codes(x, scale, zero, low, high, MANTISSA: tl.constexpr, NATIVE: tl.constexpr):  # type: ignore[no-untyped-def]
    values = tl.div_rn(x, tl.zeros_like(x) + scale)
    least, most = low - zero.to(tl.float32), high - zero.to(tl.float32)
    values = tl.where(values < least, least, values)  # comparisons, so that NaN stays
    values = tl.where(values > most, most, values)
    return _encode(values, zero, MANTISSA, NATIVE)


@triton.jit
def _normed_values(x, weights, columns, mask, inverse, NORM: tl.constexpr, DTYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    if NORM:
        weight = tl.load(weights + columns, mask=mask, other=0.0).to(tl.float32)
        x = (x * inverse * weight).to(DTYPE).to(tl.float32)
    return x
