"""Arithmetic of 4-bit floats: the E2M1 grid, and the scales of the two block formats made of it, NVFP4 and MXFP4.

A code has three bits of magnitude, places in ``0, 0.5, 1, 1.5, 2, 3, 4, 6``, and a sign bit, 8. A value is ``code *
scale`` with one scale per block of the last axis, stored in one byte:

* NVFP4, blocks of 16: E4M3, times one float32 *factor* per tensor, ``amax / (6 * 448)``, so that the block with the
  largest magnitude has the largest scale;
* MXFP4, blocks of 32: E8M0, a power of two ``2^(byte - 127)``; 255 is NaN, and there is no zero (OCP Microscaling
  Formats 1.0).

The stored scale is computed first; codes are rounded with it.
"""

import torch
from torch import Tensor

__all__ = [
    "LARGEST",
    "block_scale",
    "decode",
    "decode_scale",
    "encode",
    "neighbour",
    "round_to_grid",
    "tensor_factor",
]

LARGEST = 6.0

_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_LARGEST_SCALE, _SMALLEST_SCALE = 448.0, 2.0**-9  # of E4M3
_BIAS, _ONE, _LARGEST_BYTE = 127, 127, 254  # of E8M0


def round_to_grid(values: Tensor) -> Tensor:
    """The nearest number of the grid, half to even codes, beyond 6 to 6; float32, the sign of zero kept."""
    values = values.float().clamp(-LARGEST, LARGEST)
    size = values.abs()
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))  # of the binade: even multiples are even codes
    return torch.round(values / step) * step


def encode(values: Tensor) -> Tensor:
    """Codes, uint8 in ``[0, 15]``, of the numbers of the grid nearest to finite ``values``."""
    rounded = round_to_grid(values)
    size = rounded.abs()
    place = torch.where(size <= 2, size * 2, torch.where(size <= 4, size + 2, 7.0))
    return place.to(torch.uint8) | (rounded.signbit().to(torch.uint8) << 3)


def decode(codes: Tensor) -> Tensor:
    """The float32 numbers that codes in ``[0, 15]`` stand for."""
    table = torch.tensor([*_VALUES, *(-value for value in _VALUES)], device=codes.device)
    return table[codes.int()]


def decode_scale(stored: Tensor, factor: Tensor | None) -> Tensor:
    """The float32 scale of each block.

    Args:
        stored: E4M3 (or its values in another float dtype), or uint8: E8M0 bytes.
        factor: float32, one number, or None for 1.

    Returns:
        The shape of ``stored``.
    """
    if stored.dtype == torch.uint8:
        bits = stored.int() << 23
        bits = torch.where(stored == 0, 1 << 22, bits)  # 2^-127 is subnormal in float32
        scale = torch.where(stored == 255, torch.nan, bits.view(torch.float32))
    else:
        scale = stored.float()
    return scale if factor is None else scale * factor


def tensor_factor(largest: Tensor) -> Tensor:
    """The float32 factor of a tensor in NVFP4: its largest magnitude over 2688; 1 where that is zero."""
    factor = (largest.float() / (LARGEST * _LARGEST_SCALE)).clamp(min=torch.finfo(torch.float32).tiny)
    return torch.where(largest > 0, factor, 1.0)


def block_scale(largest: Tensor, factor: Tensor | None, *, floor: bool = False) -> Tensor:
    """The stored scale of blocks.

    Args:
        largest: float32, the largest magnitude of each block.
        factor: of the tensor: scales are E4M3, ``largest / 6 / factor`` rounded; None: scales are E8M0.
        floor: of E8M0: ``floor(log2(largest)) - 2``, the rule of the OCP specification, under which magnitudes above 6
            times the scale are clamped; otherwise ``ceil(log2(largest / 6))``, under which none is. As KL divergence
            from the original model (a Llama of 7 M parameters, GPTQ, two texts) the two hardly differ: weights alone
            0.0071 and 0.0053 by the first rule, 0.0076 and 0.0053 by the second; activations as well 0.052 and 0.044,
            0.054 and 0.044.

    Returns:
        float8_e4m3fn, or uint8 (127, that is 1, for a block of zeros).
    """
    if factor is not None:
        scale = largest.float() / LARGEST / factor
        return scale.clamp(_SMALLEST_SCALE, _LARGEST_SCALE).to(torch.float8_e4m3fn)
    mantissa, exponent = torch.frexp(largest.float())  # in [0.5, 1): 6 is 0.75 * 2^3
    exponent = exponent - 3
    if not floor:
        exponent = exponent + (mantissa > 0.75).int()
    return torch.where(largest > 0, (exponent + _BIAS).clamp(0, _LARGEST_BYTE), _ONE).to(torch.uint8)


def neighbour(stored: Tensor, steps: int) -> Tensor:
    """The scales ``steps`` representable numbers above (below: negative) those given, positive and finite."""
    if stored.dtype == torch.uint8:
        return (stored.int() + steps).clamp(0, _LARGEST_BYTE).to(torch.uint8)
    return (stored.view(torch.uint8).int() + steps).clamp(1, 126).to(torch.uint8).view(torch.float8_e4m3fn)
